"""Edits of a model that is split over processes: how far from those of one process, and what is sent for them."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch import multiprocessing
from transformers.distributed import DistributedConfig

from common import finish, new_parser, start, timed
from stableedit_cpp import StableEdit, StableEditConfig, load_model
from stableedit_cpp.model import exchange
from workload import CONFIGS, zsre

DTYPES = ("float32", "float64")


def main() -> None:
    parser = new_parser(
        'Edits ZsRE requests on a random model, in one process and split over several by tp_plan="auto" (gloo, one '
        "thread each), in float32 and float64.\nBytes are what a process receives for a turn beside what the model's "
        "own forward and backward passes exchange, and what it would to have the edited weights whole.",
        "tensor_parallel.py --json bench/results/tensor_parallel.json",
    )
    parser.add_argument("--config", default="wide", choices=list(CONFIGS), help="(default %(default)s)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="(default %(default)s)")
    parser.add_argument("--requests", type=int, default=100, metavar="N", help="requests a turn (default 100)")
    parser.add_argument("--turns", type=int, default=2, metavar="N", help="(default %(default)s)")
    parser.add_argument(
        "--tokenizer", default="smollm2-135m", metavar="MODEL", help="whose it is (default %(default)s)"
    )
    parser.add_argument("--data", default="../shared/data", metavar="DIR", help="data sets (default ../shared/data)")
    options = parser.parse_args()
    device = start(options)
    if device.type != "cpu":
        parser.error("the processes talk by gloo here, on the CPU")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        _, tokenizer = load_model(options.tokenizer)
        config = transformers.AutoConfig.for_model(**CONFIGS[options.config] | {"vocab_size": len(tokenizer)})
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        alone = {dtype: edited(directory, dtype, options) for dtype in DTYPES}
        multiprocessing.start_processes(
            _process, (directory, options), nprocs=options.processes, start_method="fork", join=True
        )
        parts = [torch.load(directory / f"{rank}.pt") for rank in range(options.processes)]
    finish("tensor_parallel", options, device, summed_up(alone, parts, options))


def _process(rank: int, directory: Path, options: Namespace) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(options.processes))
    meet = f"file://{directory}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=options.processes)
    plan = DistributedConfig(tp_plan="auto")
    torch.save({dtype: edited(directory, dtype, options, plan) for dtype in DTYPES}, directory / f"{rank}.pt")
    dist.destroy_process_group()


def edited(directory: Path, dtype: str, options: Namespace, plan: DistributedConfig | None = None) -> dict[str, object]:
    """Weights of the edited modules, what was added to them, bytes received and seconds a turn, and rows."""
    model, tokenizer = load_model(directory, dtype=getattr(torch, dtype), distributed_config=plan)
    config = StableEditConfig.one_pass(step_size=1e-4, turn_size=options.requests)
    editor = StableEdit(model, tokenizer, config, guard=None)
    before = {module.name: module.weight.detach().clone() for module in editor.modules}
    received = [0]

    def counted(parts: list[torch.Tensor], mine: torch.Tensor, **how: object) -> object:
        received[0] += mine.nbytes * (len(parts) - 1)
        return all_gather(parts, mine, **how)

    all_gather = dist.all_gather
    requests = zsre(options, options.requests * options.turns)
    with mock.patch.object(exchange.dist, "all_gather", counted):
        report, seconds = timed(torch.device("cpu"), lambda: editor.edit(requests, progress=False))
    weights = {module.name: module.weight.detach() for module in editor.modules}
    return {
        "weights": weights,
        "largest_change": max(float((weights[name] - one).abs().max()) for name, one in before.items()),
        "received_bytes_a_turn": received[0] / options.turns,
        "weight_bytes": sum(weight.nbytes for weight in weights.values()),
        "seconds_a_turn": seconds / options.turns,
        "rows_a_turn": sum(turn.answer_tokens for turn in report.turns) / options.turns,
        "shape": dict(zip(("k", "v"), editor.modules[0].shape, strict=True)),
    }


def summed_up(alone: dict[str, dict], parts: list[dict[str, dict]], options: Namespace) -> dict[str, object]:
    results: dict[str, object] = {"modules": list(alone["float32"]["weights"]), "shape": alone["float32"]["shape"]}
    for dtype in DTYPES:
        one, several = alone[dtype], [part[dtype] for part in parts]
        off = max(
            float((torch.cat([part["weights"][name] for part in several], 1) - weight).abs().max())
            for name, weight in one["weights"].items()
        )
        gathering = one["weight_bytes"] * (options.processes - 1) / options.processes
        received = max(part["received_bytes_a_turn"] for part in several)
        results[dtype] = {
            "largest_difference": off,
            "largest_change": one["largest_change"],
            "received_bytes_a_turn": received,
            "bytes_of_gathering_the_weights": gathering,
            "share": received / gathering,
            "largest_part_of_weights": max(part["weight_bytes"] for part in several) / one["weight_bytes"],
            "rows_a_turn": one["rows_a_turn"],
            "seconds_a_turn": {"one": one["seconds_a_turn"], "split": max(part["seconds_a_turn"] for part in several)},
        }
    return results


if __name__ == "__main__":
    main()

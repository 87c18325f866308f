"""Several processes edit one model together: scores and weights against those of one, and what a process is worth."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

import stableedit_cpp as se
from common import finish, new_parser, start
from stableedit_cpp.editors import EDITORS
from stableedit_cpp.files.digest import tensor_digest
from stableedit_cpp.model import exchange, ranks
from workload import add_model_options, pretrained, zsre

SCORES = ("efficacy", "generalization", "specificity")


class Meter:
    """Processor time of this process between one exchange with the others and the next, and the bytes it sends.

    On cores of their own all wait at an exchange for the last: the sum of the longest of each of these stretches is
    how long the whole takes there, but for the latency of the transport.
    """

    def __init__(self) -> None:
        self.stretches: list[float] = []
        self.labels: list[str] = []  # of the exchange that each ends with
        self.bytes = 0
        self._since = time.process_time()
        self._meet, self._pack = ranks.Ranks._exchange, exchange._pack

    def __enter__(self) -> Meter:
        meter = self

        def meet(group: ranks.Ranks, label: str, *arguments: object) -> object:
            meter.mark(label)
            return meter._meet(group, label, *arguments)

        def pack(*arguments: object) -> torch.Tensor:
            payload = meter._pack(*arguments)
            meter.bytes += len(payload)
            return payload

        ranks.Ranks._exchange, exchange._pack = meet, pack
        return self

    def __exit__(self, *_exception: object) -> None:
        self.mark("the rest")
        ranks.Ranks._exchange, exchange._pack = self._meet, self._pack

    def mark(self, label: str) -> None:
        now = time.process_time()
        self.labels.append(label)
        self.stretches.append(now - self._since)
        self._since = now


def work(options, model, tokenizer, requests) -> dict[str, object]:
    """Edit and score, with however many processes there are."""
    changes = {"max_tokens_per_forward": options.max_tokens}
    changes |= {"edit_modules": options.edit_modules} if options.edit_modules else {}
    config = dataclasses.replace(EDITORS[options.preset].config, **changes)
    editor = se.editors.make_editor(model, tokenizer, config)
    found: dict[str, object] = {}
    begin = time.perf_counter()
    with Meter() as meter:
        report = editor.edit(requests, progress=ranks.ranks().lead)
    found["edit"] = measured(meter, begin)
    found["turns"] = [(turn.passes, turn.taken, turn.back_offs) for turn in report.turns]
    digests = [tensor_digest(weight.master) for weight in editor.weights.values()]
    statistics = [tensor_digest(t) for part in editor.state_dict().values() for t in part.values()]
    found["digest"] = tensor_digest(torch.tensor(list("".join(digests + statistics).encode())))
    begin = time.perf_counter()
    with Meter() as meter:
        how = {"metrics": ["accuracy"], "chat_template": editor.form.chat}
        scores = se.evaluate(model, tokenizer, requests[: options.scored], **how, progress=ranks.ranks().lead)
    found["evaluate"] = measured(meter, begin)
    found["scores"] = {name: scores[name].mean for name in SCORES}
    return found


def measured(meter: Meter, begin: float) -> dict[str, object]:
    wall = time.perf_counter() - begin
    return {"stretches": meter.stretches, "labels": meter.labels, "bytes": meter.bytes, "wall": wall}


def together(size: int, *arguments: object) -> list[dict[str, object]]:
    """What ``work`` gives in each of so many forked processes."""
    with tempfile.TemporaryDirectory() as scratch:

        def run(rank: int) -> None:
            dist.init_process_group("gloo", init_method=f"file://{scratch}/meet", rank=rank, world_size=size)
            with se.data_parallel():
                torch.save(work(*arguments), f"{scratch}/{rank}")
            dist.destroy_process_group()
            os._exit(0)

        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=run, args=(rank,)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return [torch.load(Path(scratch, str(rank)), weights_only=False) for rank in range(size)]


def line(found: list[dict[str, object]], one: list[dict[str, object]]) -> dict[str, object]:
    """What is said of so many processes, beside one."""
    size = len(found)
    record: dict[str, object] = {"processes": size}
    for part in ("edit", "evaluate"):
        own = sum(one[0][part]["stretches"])
        stretches = [each[part]["stretches"] for each in found]
        longest = [max(together) for together in zip(*stretches, strict=True)]
        by_part: dict[str, float] = {}
        for label, seconds in zip(found[0][part]["labels"], longest, strict=True):
            by_part[label] = by_part.get(label, 0.0) + seconds
        longest = sum(longest)
        record[part] = {
            "processor_seconds": sum(map(sum, stretches)),
            "longest_seconds": longest,
            "longest_seconds_until": by_part,
            "worth_of_a_process": own / longest / size,
            "worth_by_processor_time": own / sum(map(sum, stretches)),
            "wall_seconds": found[0][part]["wall"],
            "exchanges": len(stretches[0]) - 1,
            "megabytes_sent_by_each": sum(each[part]["bytes"] for each in found) / size / 1e6,
        }
    record["scores"] = found[0]["scores"]
    record["replicas_bit_identical"] = len({each["digest"] for each in found}) == 1
    record["bits_of_one_process"] = all(each["digest"] == one[0]["digest"] for each in found)
    record["decisions_of_one_process"] = all(each["turns"] == one[0]["turns"] for each in found)
    record["scores_of_one_process"] = all(each["scores"] == one[0]["scores"] for each in found)
    return record


def main() -> None:
    parser = new_parser(
        "Edits ZsRE with one process, with two and with four, forked on this machine, and scores all edits. Speed is\n"
        "by processor time, so that it says the same on a machine that does other things meanwhile: see Meter.",
        "data_parallel.py --preset one-pass --edits 400 --scored 40 --json bench/results/data_parallel.json",
    )
    add_model_options(parser)
    parser.add_argument("--edits", type=int, default=1000, metavar="N", help="default 1000")
    parser.add_argument("--scored", type=int, metavar="N", help="score the first N of them (default: all)")
    parser.add_argument("--preset", default="stableedit", metavar="NAME", help="settings by name (default stableedit)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="default 1 2 4")
    options = parser.parse_args()
    if options.processes[0] != 1:
        parser.error("--processes begins with 1, which the others are compared with")
    options.threads = options.threads or 1
    device = start(options)
    model, tokenizer, _ = pretrained(options, device)
    requests = zsre(options, options.edits)
    found = [together(size, options, model, tokenizer, requests) for size in options.processes]
    results = [line(each, found[0]) for each in found]
    for record in results:
        record["edits_per_second"] = len(requests) / record["edit"]["longest_seconds"]
    finish("data_parallel", options, device, {"edits": len(requests), "results": results})


if __name__ == "__main__":
    main()

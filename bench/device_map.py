"""The same edits in a model in memory and offloaded to host memory and disk: the same scores, and what it costs."""

from __future__ import annotations

import argparse
import gc
import tempfile
import time

import torch
from accelerate import cpu_offload, disk_offload

import stableedit_cpp as se
from common import finish, new_parser, start
from stableedit_cpp.files.digest import tensor_digests
from workload import add_model_options, pretrained, zsre

WAYS = ("memory", "host memory", "disk")


def main() -> None:
    parser = new_parser(
        "Edits ZsRE requests with one pass a turn and scores them, in a model that lies in memory, one that accelerate "
        "has offloaded to host memory, and one on the disk; all run on --device.",
        "device_map.py --edits 60 --threads 1 --json bench/results/device_map.json",
    )
    add_model_options(parser)
    parser.add_argument(
        "--edits", type=int, default=60, metavar="N", help="in turns of half of them (default %(default)s)"
    )
    options = parser.parse_args()
    device = start(options)
    found = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as directory:
            found[way] = edited(way, directory, options, device)
            gc.collect()
    plain = found[WAYS[0]]
    results = {
        "same_scores": all(one["scores"] == plain["scores"] for one in found.values()),
        "same_bits": all(one["weights"] == plain["weights"] for one in found.values()),
        "times_as_long": {way: found[way]["edit_processor_seconds"] / plain["edit_processor_seconds"] for way in WAYS},
        **found,
    }
    finish("device_map", options, device, results)


def edited(way: str, directory: str, options: argparse.Namespace, device: torch.device) -> dict[str, object]:
    model, tokenizer, modules = pretrained(options, device)
    names = [module.name for module in modules]
    if way == "host memory":
        cpu_offload(model, execution_device=device)
    elif way == "disk":
        disk_offload(model, directory, execution_device=device)
    config = se.StableEditConfig.one_pass(
        edit_modules=names, turn_size=max(1, options.edits // 2), max_tokens_per_forward=options.max_tokens
    )
    editor = se.StableEdit(model, tokenizer, config, guard=None)
    requests = zsre(options, options.edits)
    begin = time.process_time()
    editor.edit(requests, progress=False)
    middle = time.process_time()
    scores = se.evaluate(
        model, tokenizer, requests, chat_template=False, trunk=editor.make_trunk_cache(), progress=False
    )
    return {
        "edit_processor_seconds": middle - begin,
        "score_processor_seconds": time.process_time() - middle,
        "scores": scores.means(),
        "weights": tensor_digests({module.name: module.weight for module in editor.modules}),
    }


if __name__ == "__main__":
    main()

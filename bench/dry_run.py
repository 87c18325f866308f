"""A stream of millions of edits through ``stableedit bench``, with a tiny random model: memory must not grow."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from common import finish, new_parser, start
from stableedit_cpp.experiments import read_run
from ultraeditbench import records, write


def main() -> None:
    parser = new_parser(
        "Writes a synthetic data set in UltraEditBench's format and edits all of it into a random model of two tiny\n"
        "layers, by `stableedit bench` in a process of its own. Memory and time of the last tenth of the turns are\n"
        "compared with those of the second.",
        "dry_run.py --records 2000000 --output /tmp/dry --json bench/results/dry_run.json",
    )
    parser.add_argument("--records", type=int, default=2_000_000, metavar="N", help="default 2,000,000")
    parser.add_argument("--turn-size", type=int, default=200, metavar="N", help="default 200, as published for 2M")
    parser.add_argument("--output", metavar="DIR", help="keep data and run there, and go on where it stopped")
    options = parser.parse_args()
    device = start(options)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(options.output or scratch)
        place.mkdir(parents=True, exist_ok=True)
        data = place / "ultraeditbench.json"
        if not data.exists():
            write(data, options.records)
        save_model(place / "tiny-random")
        begin = time.perf_counter()
        subprocess.run(command(place, data, options), check=True)
        wall = time.perf_counter() - begin
        finish("dry_run", options, device, results(place / "runs" / f"ultraedit-{data.stem}-tiny-random-seed0", wall))


def command(place: Path, data: Path, options: argparse.Namespace) -> list[str]:
    settings = ["--editor", "ultraedit", "--dataset", data, "--model", place / "tiny-random", "--warm-up", "none"]
    settings += ["--turn-size", options.turn_size, "--sample", 1000, "--checkpoints", 4, "--geometry", 0]
    settings += ["--edit-modules", "model.layers.1.mlp.down_proj", "--device", options.device]
    settings += ["--output", place / "runs"]
    return [sys.executable, "-m", "stableedit_cpp", "bench", *map(str, settings)]


def save_model(directory: Path) -> None:
    """A random Llama of two layers, and a tokenizer trained on the data set's own words."""
    texts = (" ".join(record.values()) for record in islice(records(2000, seed=1), 2000))
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(directory)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=256)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def results(run: Path, wall: float) -> dict[str, object]:
    document = read_run(run)
    with (run / "turns.jsonl").open(encoding="utf-8") as file:
        turns = [(line["resident_bytes"], sum(line["seconds"].values())) for line in map(json.loads, file)]
    tenth = max(len(turns) // 10, 1)
    second, last = turns[tenth : 2 * tenth] or turns, turns[-tenth:]
    return {
        "records": document["checkpoints"][-1]["edits"],
        "turns": len(turns),
        "records_per_second": document["cost"]["edits_per_second"],
        "wall_seconds_of_this_process": wall,
        "peak_resident_bytes": document["cost"]["peak_resident_bytes"],
        "resident_bytes_second_tenth": statistics.median(memory for memory, _ in second),
        "resident_bytes_last_tenth": statistics.median(memory for memory, _ in last),
        "last_over_second_tenth_memory": max(m for m, _ in last) / max(m for m, _ in second),
        "last_over_second_tenth_time": statistics.median(s for _, s in last) / statistics.median(s for _, s in second),
        "stints": len(document["provenance"]["stints"]),
        "cost": document["cost"],
    }


if __name__ == "__main__":
    main()

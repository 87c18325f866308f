"""Sends a server bodies and patch files that were damaged at random, and looks at what it answers.

It must neither die nor fail: every answer is a success or a refusal with one sentence.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from client import Server
from tqdm.auto import tqdm

from stableedit_cpp import core

# Texts that parsers have stumbled over: numbers at limits, broken escapes and UTF-8, deep nesting, control characters.
_SPLICES = [
    *(b"0", b"-1", b"1e999", b"9223372036854775808", b"18446744073709551616", b"null", b"true", b"{}", b"[]", b'""'),
    *(b"\\u0000", b"\\ud800", b"\xff\xfe", b"\xed\xa0\x80", b"\0", b"\r\n\r\n", b"../", b"%2e%2e%2f", b"[" * 2000),
    *(b'{"a":' * 500, b"A" * 5000, b'"prompt":', b'"file":', b"F64", b"BOOL", b"I64", b'"data_offsets":[0,0]'),
]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four damages: bits, splices, cuts, repetitions, numbers that became others."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(result) + 1)
        end = min(len(result), at + rng.choice([1, 1, 2, 4, 8, 40]))
        kind = rng.randrange(6)
        if kind == 0 and at < len(result):
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            result[at:end] = rng.choice(_SPLICES)
        elif kind == 2:
            del result[at:end]
        elif kind == 3:
            del result[at:]
        elif kind == 4:
            result[at:at] = result[at:end] * rng.randint(1, 5)
        else:
            digits = [i for i, byte in enumerate(result[:4096]) if 48 <= byte <= 57]
            if digits:
                result[rng.choice(digits)] = rng.choice(b"0123456789-.e")
    return bytes(result)


def mutate_content(path: Path, target: Path, rng: random.Random) -> None:
    """Write a patch whose container and checksum are right, but not what it says."""
    tensors, metadata = core.load_safetensors(path)
    name = rng.choice(list(tensors))
    tensor = tensors.pop(name)
    kind = rng.randrange(7)
    if kind == 0:
        tensors[name] = tensor * rng.choice([float("nan"), float("inf"), 1e38, -1.0, 0.0])
    elif kind == 1:
        tensors[name] = tensor.narrow(rng.randrange(2), 0, 1)
    elif kind == 2:
        tensors[name] = tensor.to(rng.choice([torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]))
    elif kind == 3:
        tensors[name] = rng.choice([tensor.flatten(), tensor[None], tensor.sum(), tensor[:0], tensor.t().contiguous()])
    elif kind == 4:
        tensors[mutate(name.encode(), rng).decode("utf-8", "replace")] = tensor
    elif kind == 5:
        tensors[name] = tensor
        key = rng.choice(list(metadata))
        metadata[key] = mutate(metadata[key].encode(), rng).decode("utf-8", "replace")
    # 6: the tensor is missing
    core.save_safetensors(target, tensors, metadata)


def check(status: int, answer: bytes, sent: bytes) -> None:
    """Raise AssertionError unless this is a success or a refusal with a sentence."""
    context = f"status {status}, answer {answer[:300]!r} for {sent[:300]!r}"
    assert status in (200, 201) or 400 <= status < 500, context
    document = json.loads(answer)
    if status >= 400:
        sentence = document["error"]
        assert isinstance(sentence, str) and len(sentence.split()) >= 3 and "\n" not in sentence, context
        assert "exception" not in sentence.lower() and "Error:" not in sentence, context


def run(server: Server, patches: Path, valid: Path, count: int, seed: int = 0) -> Counter:
    """``count`` mutated requests; returns how often each kind got each status."""
    rng = random.Random(seed)
    generate = json.dumps({"prompt": "The capital of Österreich\n is \\", "max_tokens": 2}).encode()
    add = json.dumps({"file": "mutated.safetensors", "id": "an-id"}).encode()
    valid_patch = valid.read_bytes()
    header = int.from_bytes(valid_patch[:8], "little") + 8
    file = patches / "mutated.safetensors"
    add_file = b'{"file": "mutated.safetensors", "id": "mutated"}'
    seen: Counter = Counter()

    def patch_bytes() -> tuple[int, bytes, bytes]:
        # Half of the damage goes into the header, which is small: the rest is numbers.
        if rng.random() < 0.5:
            damaged = mutate(valid_patch[:header], rng) + valid_patch[header:]
        else:
            damaged = mutate(valid_patch, rng)
        file.write_bytes(damaged)
        return (*server.send("POST", "/patches", add_file), damaged)

    def patch_content() -> tuple[int, bytes, bytes]:
        mutate_content(valid, file, rng)
        return (*server.send("POST", "/patches", add_file), file.read_bytes())

    def body(path: str, text: bytes) -> Callable[[], tuple[int, bytes, bytes]]:
        def send() -> tuple[int, bytes, bytes]:
            damaged = mutate(text, rng)
            return (*server.send("POST", path, damaged), damaged)

        return send

    kinds = {
        "/generate": body("/generate", generate),
        "/patches": body("/patches", add),
        "bytes of a patch file": patch_bytes,
        "content of a patch": patch_content,
    }
    for number in tqdm(range(count), desc="Mutations", unit="request", disable=None):
        name = list(kinds)[number % len(kinds)]
        status, answer, sent = kinds[name]()
        check(status, answer, sent)
        seen[name, status] += 1
        if status == 201:  # harmless damage, and the patch is applied
            server.remove(json.loads(answer)["id"])
    assert server.process.poll() is None
    return seen


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python mutate.py --server build/server/hot_edit_server --model exported "
        "--patch a-patch.safetensors --count 100000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--server", required=True, metavar="FILE", help="the program")
    parser.add_argument("--model", required=True, metavar="DIR", help="of export_model.py; best of a tiny model")
    parser.add_argument("--patch", required=True, type=Path, metavar="FILE", help="a patch that fits the model")
    parser.add_argument("--count", type=int, default=100_000, metavar="N", help="default 100000")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        patches = Path(scratch, "patches")
        patches.mkdir()
        with Server(options.server, model=options.model, patches=patches, state=Path(scratch, "state")) as server:
            seen = run(server, patches, options.patch, options.count, options.seed)
            ended = server.stop()
    for (name, status), times in sorted(seen.items()):
        print(f"{times:>8}  {name:<22} {status}")
    print(f"{sum(seen.values())} mutated requests, no crash, every refusal a sentence; exit status {ended}")
    return ended


if __name__ == "__main__":
    sys.exit(main())

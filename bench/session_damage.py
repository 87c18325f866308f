"""Damages the journal of a session in many ways and counts what is not noticed."""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from common import finish, new_parser, start
from stableedit_cpp import StableEditConfig
from stableedit_cpp.lifelong import LifelongSession
from stableedit_cpp.lifelong.journal.journal import Journal

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.damage import KINDS, mutate
from support.tiny import FACTS, pattern_of, tiny_model, tiny_tokenizer


def main() -> None:
    parser = new_parser(
        "Makes a session of a tiny model, damages copies of its journal (flipped bits, overwritten, deleted, inserted "
        "and appended bytes, truncation,\nand whole records deleted, duplicated, exchanged or dropped at the end) and "
        "looks whether each is noticed, and every record before it still there.",
        "session_damage.py --count 200 --json bench/results/session_damage.json",
    )
    parser.add_argument("--count", type=int, default=200, metavar="N", help="damaged journals (default 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    options = parser.parse_args()
    start(options)
    with tempfile.TemporaryDirectory(prefix="session-damage-") as directory:
        results = damage(Path(directory) / "s", options.count, random.Random(options.seed))
    finish("session_damage", options, torch.device("cpu"), results)
    if results["detected"] != options.count:
        raise SystemExit("some damage was not noticed")


def damage(place: Path, count: int, source: random.Random) -> dict[str, object]:
    config = StableEditConfig.one_pass(edit_modules=[pattern_of("llama")], step_size=1e-2, turn_size=3)
    with LifelongSession.create(place, tiny_model("llama"), tiny_tokenizer(), config) as session:
        session.edit(FACTS, progress=False)
        session.rollback(3)
        session.revert([request.id for request in session.current_requests()][:1])
    journal = Journal(place)
    original = journal.path.read_bytes()
    limits = [(record.offset, record.end) for record in journal.records]
    detected, behind, by_kind, reasons = 0, 0, Counter(), Counter()
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        data = original
        while data == original:  # zeros over zeros are no damage
            data = mutate(original, limits, kind, source)
        journal.path.write_bytes(data)
        found = Journal(place)
        noticed = found.damage is not None and found.records == journal.records[: found.damage.record]
        if noticed and found.damage.in_flight:  # would be cut off without asking: nothing that was done may be in it
            noticed = len(found.records) == len(limits)
        detected += noticed
        by_kind[kind] += noticed
        if found.damage is not None:
            behind += found.damage.in_flight
            reasons["".join(letter for letter in found.damage.reason if not letter.isdigit())] += 1
    return {
        "journals": count,
        "detected": detected,
        "detected_by_kind": dict(by_kind),
        "behind_all_records": behind,
        "records": len(limits),
        "bytes": len(original),
        "reasons": dict(reasons.most_common()),
    }


if __name__ == "__main__":
    main()

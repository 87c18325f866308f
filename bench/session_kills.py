"""Kills a session at random instants, again and again, and compares what it ends with to a run that nobody killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from argparse import Namespace
from collections import Counter
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 both models are of this kind
from tqdm import tqdm

from common import finish, new_parser, start
from stableedit_cpp import EditRequest, StableEdit, StableEditConfig, load_model
from stableedit_cpp.files.digest import tensor_digests
from stableedit_cpp.lifelong import LifelongSession, SessionView
from stableedit_cpp.lifelong.journal.snapshots import state_digests
from workload import zsre

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support.tiny import FACTS, pattern_of, tiny_model, tiny_tokenizer

# A new process is started for every run, as after a crash. It is forked from one that has imported everything but
# computed nothing yet, which saves the imports.
_processes = multiprocessing.get_context("fork")


def main() -> None:
    parser = new_parser(
        "Edits one stream in a session whose process is killed (SIGKILL) at random instants and started again, until "
        "it has been killed often enough and\nthe stream is done (a new one is begun if it is done before). The "
        "digests of weights and statistics are compared with those of an editor without a session.",
        "session_kills.py --kills 50 --turns 30\n  python bench/session_kills.py --model smollm2-135m --kills 5 "
        "--turns 30 --turn-size 10 --threads 2 --json bench/results/session_kills_smollm2.json",
    )
    parser.add_argument("--model", default="tiny", help="tiny (random weights) or as for other benchmarks")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="default 50")
    parser.add_argument("--turns", type=int, default=30, metavar="N", help="turns of the stream (default 30)")
    parser.add_argument("--turn-size", type=int, default=5, metavar="N", help="requests a turn (default 5)")
    parser.add_argument("--warm-up", type=int, default=6, metavar="N", help="of the turns, so many warm up (default 6)")
    parser.add_argument("--detail", default="factors", choices=["factors", "requests"])
    parser.add_argument("--snapshot-every", type=int, default=5, metavar="N", help="default 5")
    parser.add_argument("--passes", type=int, default=2, metavar="N", help="at most so many a turn (default 2)")
    parser.add_argument("--data", default="../shared/data", metavar="DIR", help="data sets (default ../shared/data)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the instants (default 0)")
    options = parser.parse_args()
    threads, options.threads = options.threads, None  # set in the children: this process must not start any
    start(options)
    options.threads = threads
    with tempfile.TemporaryDirectory(prefix="session-kills-") as directory:
        results = kill_and_compare(options, Path(directory))
    options.threads = threads
    finish("session_kills", options, torch.device("cpu"), results)
    if not results["bits_equal"]:
        raise SystemExit("the bits differ")


def kill_and_compare(options: Namespace, directory: Path) -> dict[str, object]:
    reference = in_process(plain, options)
    source = random.Random(options.seed)
    kills = streams = runs = 0
    equal, found, instants = True, Counter(), []
    # Turns between two kills, for all of them to fall into one stream; each kill costs half a turn on average.
    spread = 2 * options.turns / options.kills + 1
    limit = reference["open_seconds"] + spread * reference["turn_seconds"]
    bar = tqdm(total=options.kills, desc="Killing", unit="kill")
    while kills < options.kills:
        place = directory / f"stream-{streams}"
        done = None
        while done is None:
            instant = source.uniform(0.0, limit) if kills < options.kills else None
            done = in_process(session, options, place, kill_after=instant)
            runs += 1
            if done is None:
                kills += 1
                bar.update()
                instants.append(instant)
                found[what_was_left(place)] += 1
        streams += 1
        equal = equal and done["digests"] == reference["digests"]
        shutil.rmtree(place)
    bar.close()
    return {
        "kills": kills,
        "streams": streams,
        "runs": runs,
        "bits_equal": equal,
        "tensors_compared": len(reference["digests"]),
        "left_behind": dict(found),
        "instants_seconds": {"min": min(instants), "max": max(instants)},
        "turn_seconds": reference["turn_seconds"],
    }


def what_was_left(place: Path) -> str:
    """What the kill interrupted, as far as the disk tells."""
    if not (place / "journal").exists():
        return "no session yet"
    view = SessionView(place)
    if view.journal.damage is not None:
        assert view.journal.damage.in_flight, view.journal.damage
        return "a torn record"
    if list((place / "snapshots").glob(".*")):
        return "an unfinished snapshot"
    if list(place.glob("*.tmp")) or not view.journal.acknowledged:
        return "a record that was not acknowledged"
    return "whole records"


def in_process(work, options: Namespace, *arguments, kill_after: float | None = None) -> dict | None:
    """Run ``work`` in a process of its own; None if it was killed before it was done."""
    receiver, sender = _processes.Pipe(duplex=False)
    process = _processes.Process(target=_child, args=(sender, work, options, *arguments))
    process.start()
    sender.close()
    receiver.recv()  # it is about to begin
    if kill_after is not None and not receiver.poll(kill_after):
        os.kill(process.pid, signal.SIGKILL)
    try:
        result = receiver.recv()
    except EOFError:
        result = None
    process.join()
    if result is None and process.exitcode != -signal.SIGKILL:
        raise SystemExit(f"a run ended by itself with exit status {process.exitcode}")
    return result


def _child(sender, work, options: Namespace, *arguments) -> None:
    tqdm.set_lock(threading.RLock())  # its own: who is killed while it draws a bar would hold that of all for ever
    warnings.simplefilter("ignore")  # a turn in flight that is cut off is what this is about
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer, config, warm_up, edits = workload(options)
    sender.send("ready")
    sender.send(work(options, model, tokenizer, config, warm_up, edits, *arguments))


def plain(options: Namespace, model, tokenizer, config, warm_up: list, edits: list) -> dict:
    """An editor without a session."""
    with tempfile.TemporaryDirectory() as place:
        begin = time.perf_counter()
        LifelongSession.create(place, model, tokenizer, config).close()
        opening = time.perf_counter() - begin
    editor = StableEdit(model, tokenizer, config)
    begin = time.perf_counter()
    editor.warm_up(warm_up, progress=False)
    editor.edit(edits, progress=False)
    seconds = (time.perf_counter() - begin) / options.turns
    return {"digests": digests_of(editor), "turn_seconds": seconds, "open_seconds": opening}


def session(options: Namespace, model, tokenizer, config, warm_up: list, edits: list, place: Path) -> dict:
    """Begin the session or go on with it, whatever is there."""
    if (place / "journal").exists():
        opened = LifelongSession.open(place, model, tokenizer, progress=False)
    else:
        settings = {"detail": options.detail, "snapshot_every": options.snapshot_every}
        opened = LifelongSession.create(place, model, tokenizer, config, **settings)
    with opened:
        opened.warm_up(opened.pending(warm_up, warm_up=True), progress=False)
        opened.edit(opened.pending(edits), progress=False)
        return {"digests": digests_of(opened.editor)}


def digests_of(editor: StableEdit) -> dict[str, str]:
    """Of the whole model and of masters and statistics."""
    model = tensor_digests({f"model/{name}": tensor for name, tensor in editor.model.state_dict().items()})
    return model | state_digests(editor.state_dict())


def workload(options: Namespace) -> tuple:
    """(model, tokenizer, config, warm-up requests, requests), the same in every process."""
    warm, rest = options.warm_up * options.turn_size, (options.turns - options.warm_up) * options.turn_size
    settings = {"turn_size": options.turn_size, "max_passes": options.passes, "past_key_weight": 0.02}
    if options.model != "tiny":
        model, tokenizer = load_model(options.model)
        return (
            model,
            tokenizer,
            StableEditConfig.one_pass(**settings),
            zsre(options, warm, "train"),
            zsre(options, rest),
        )
    config = StableEditConfig.one_pass(edit_modules=[pattern_of("llama")], step_size=1e-2, **settings)
    return tiny_model("llama"), tiny_tokenizer(), config, tiny_requests(warm, "w"), tiny_requests(rest, "e")


def tiny_requests(count: int, prefix: str) -> list[EditRequest]:
    facts = [FACTS[number % len(FACTS)] for number in range(count)]
    return [
        EditRequest(f"{prefix}{number}: {fact['prompt']}", fact["target"], id=f"{prefix}{number}")
        for number, fact in enumerate(facts)
    ]


if __name__ == "__main__":
    main()

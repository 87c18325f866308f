"""Two million requests: read and checked, through a session, in its journal and index, and scored."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from common import finish, new_parser, start
from stableedit_cpp import UltraEdit, UltraEditConfig
from stableedit_cpp.data import open_requests
from stableedit_cpp.files.environment import resident_bytes
from stableedit_cpp.lifelong import LifelongSession, SessionView
from stableedit_cpp.lifelong.history import History
from stableedit_cpp.lifelong.index import FILE, Index, remove_index
from stableedit_cpp.lifelong.journal.writer import append
from ultraeditbench import records, write

_STABLEEDIT = [sys.executable, "-m", "stableedit_cpp"]
_PARTS = ("read", "edit", "whole", "evaluate")


def main() -> None:
    parser = new_parser(
        "With a tiny random model, UltraEdit in one module, and detail requests. read: reads a file, finds out what is "
        "left of it, and checks it.\nedit: gives it to `stableedit session edit`, which is interrupted after a while. "
        "whole: records as many turns as the whole file has, without a\nmodel, and opens that session again. evaluate: "
        "`stableedit evaluate --metrics accuracy`. Each says how many requests it was (`requests`),\nand processor "
        "seconds beside those of the clock: a machine may be busy with other work.",
        "two_million.py --part read --json bench/results/two_million_read.json",
    )
    parser.add_argument("--part", choices=_PARTS, required=True)
    parser.add_argument("--records", type=int, default=2_000_000, metavar="N", help="of the file (default 2,000,000)")
    parser.add_argument("--turn-size", type=int, default=100, metavar="N", help="default 100")
    parser.add_argument("--seconds", type=float, default=900, metavar="N", help="of editing (default 900)")
    options = parser.parse_args()
    device = start(options)
    with tempfile.TemporaryDirectory(prefix="two-million-") as directory:
        place = Path(directory)
        save_model(place / "model")
        results = {}
        # A tenth before, since memory must not depend on the length.
        for count in (
            (options.records,) if options.part in ("edit", "whole") else (options.records // 10, options.records)
        ):
            write(place / "edits.jsonl", count)
            found = globals()[options.part](place, place / "edits.jsonl", count, options)
            results[str(count)] = {"file_bytes": (place / "edits.jsonl").stat().st_size, **found}
    finish(f"two_million_{options.part}", options, device, results)


def save_model(path: Path) -> None:
    """With a token a word, as large vocabularies have nearly."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = (" ".join((r["prompt"], r["rephrase_prompt"], r["loc"], r["ans"])) for r in records(20_000))
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **sizes, vocab_size=len(tokenizer), max_position_embeddings=256, bos_token_id=1, eos_token_id=1, pad_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def settings(turn_size: int) -> UltraEditConfig:
    modules = ["model.layers.1.mlp.down_proj"]
    return UltraEditConfig(edit_modules=modules, step_size=1e-4, turn_size=turn_size, chat_template=False)


class Child:
    """A process that is watched from outside: moments, processor seconds and resident bytes."""

    def __init__(self, command: list[str], log: Path) -> None:
        with log.open("w") as file:
            self._process = subprocess.Popen(command, stdout=file, stderr=file)
        self._log = log
        self.pid = self._process.pid
        self.samples: list[tuple[float, float, int]] = []

    def watch(self) -> Iterator[float]:
        """The seconds since it began, a few times a second, until it ends."""
        begin = time.perf_counter()
        while self._process.poll() is None:
            moment = time.perf_counter() - begin
            try:
                resident = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            except (OSError, IndexError):
                break
            processor = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            self.samples.append((moment, processor, resident))
            yield moment
            time.sleep(0.1)
        if self._process.wait() not in (0, 130):
            raise SystemExit(self._log.read_text()[-3000:])


def read(place: Path, _file: Path, count: int, options) -> dict[str, object]:
    """In a process of its own, whose memory is looked at from here."""
    return _in_child("read", place, options, count)


def whole(place: Path, _file: Path, count: int, options) -> dict[str, object]:
    found = _in_child("record", place, options, count)
    for name in ("by_the_index", "by_the_journal"):
        if name == "by_the_journal":
            remove_index(place / "whole")
        found[f"opened_{name}"] = _in_child("open", place, options, count)
    return found


def _in_child(what: str, place: Path, options, count: int) -> dict[str, object]:
    child = Child([sys.executable, __file__, "child", what, str(place), str(options.turn_size)], place / "log")
    for _ in child.watch():
        pass
    found = json.loads((place / "log").read_text().splitlines()[-1])
    return {"requests": count, **found, "peak_resident_bytes": max(size for *_, size in child.samples)}


def child(what: str, place: Path, turn_size: int) -> None:
    """Prints seconds by the clock and of the processor, of each step."""
    torch.set_num_threads(1)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(place / "model"),
        AutoTokenizer.from_pretrained(place / "model"),
    )
    found: dict[str, object] = {"resident_bytes_before": resident_bytes()}

    def step(name: str, work):
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        result = work()
        now = resource.getrusage(resource.RUSAGE_SELF)
        found[name] = {
            "seconds": time.perf_counter() - begin,
            "processor_seconds": now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime,
        }
        return result

    if what == "read":
        requests = step("read", lambda: open_requests(place / "edits.jsonl", progress=False))
        left = step("what_is_left", lambda: History().pending(requests))
        step("check", lambda: UltraEdit(model, tokenizer, settings(turn_size), guard=None).check(left))
        every = sum(found[name]["processor_seconds"] for name in ("read", "what_is_left", "check"))
        found["records_per_processor_second"] = len(requests) / every
    elif what == "record":
        step("record", lambda: found.update(_record(place, model, tokenizer, turn_size)))
    else:
        session = step("open", lambda: LifelongSession.open(place / "whole", model, tokenizer, progress=False))
        status = step("status", session.status)
        step("find_one", lambda: session.history.entries[f"r{status.edits // 2}"].state)
        found |= {"turn": status.turn, "current": status.current}
    print("\n" + json.dumps(found))


def _record(place: Path, model, tokenizer, turn_size: int) -> dict[str, object]:
    """A session of the whole file: the first turn is edited, and the others are recorded as it was."""
    directory, requests = place / "whole", open_requests(place / "edits.jsonl", progress=False)
    with LifelongSession.create(directory, model, tokenizer, settings(turn_size), detail="requests") as session:
        session.editor.guard = None
        session.edit(list(requests[:turn_size]), progress=False)
        turn = dict(session.history.steps[1].record.content)
    view, number = SessionView(directory, index=Index.on_disk(directory)), turn_size
    every = islice(requests, turn_size, None)
    while part := list(islice(every, turn_size)):
        named = [{**request.to_dict(), "id": f"r{number + place}"} for place, request in enumerate(part)]
        append(view, {**turn, "requests": named, "turn": view.history.next_turn, "supersedes": {}})
        number += len(part)
    last = view.history.number(view.history.turn)
    view.snapshots.path(1).rename(view.snapshots.path(last))
    sizes = {"journal_bytes": view.journal.end, "index_bytes": (directory / FILE).stat().st_size}
    return {"turns": view.history.turn, **sizes, "snapshot_bytes": view.snapshots.path(last).stat().st_size}


def edit(place: Path, file: Path, count: int, options) -> dict[str, object]:
    """The command, interrupted once it has edited for so long."""
    session, config = place / "session", place / "config.json"
    config.write_text(settings(options.turn_size).to_json())
    create = ["session", "create", str(session), "--model", str(place / "model"), "--config", str(config)]
    create += ["--detail", "requests", "--snapshot-every", "100", "--no-guard"]
    subprocess.run([*_STABLEEDIT, *create], check=True, capture_output=True)
    journal, empty, first = session / "journal", (session / "journal").stat().st_size, None
    command = Child(
        [*_STABLEEDIT, "session", "edit", str(session), "--requests", str(file), "--no-guard"], place / "log"
    )
    for moment in command.watch():
        if first is None and journal.stat().st_size > empty:
            first = len(command.samples) - 1
        if first is not None and moment - command.samples[first][0] > options.seconds:
            os.kill(command.pid, signal.SIGINT)
            options.seconds = float("inf")
    status = SessionView(session).status()
    (begin, before, _), (end, after, _) = command.samples[first], command.samples[-1]
    editing = [size for *_, size in command.samples[first:]]
    return {
        "requests": count,
        "edited": status.edits,
        "turns": status.turn,
        "before_the_first_turn": {"seconds": begin, "processor_seconds": before},
        "editing": {"seconds": end - begin, "processor_seconds": after - before},
        "edits_per_second": status.edits / (end - begin),
        "edits_per_processor_second": status.edits / (after - before),
        "peak_resident_bytes": max(size for *_, size in command.samples),
        "resident_bytes_second_tenth_of_editing": _mean_of_tenth(editing, 1),
        "resident_bytes_last_tenth_of_editing": _mean_of_tenth(editing, 9),
        "journal_bytes_per_request": status.journal_bytes / status.edits,
        "index_bytes_per_request": (session / FILE).stat().st_size / status.edits,
    }


def evaluate(place: Path, file: Path, count: int, options) -> dict[str, object]:
    command = [*_STABLEEDIT, "evaluate", "--model", str(place / "model"), "--requests", str(file)]
    process = Child([*command, "--metrics", "accuracy", "--no-chat-template"], place / "log")
    for _ in process.watch():
        pass
    seconds, processor, _ = process.samples[-1]
    found = {"requests": count, "seconds": seconds, "processor_seconds": processor}
    found["records_per_processor_second"] = count / processor
    sizes = [size for *_, size in process.samples]
    found |= {
        f"resident_bytes_{name}_tenth": _mean_of_tenth(sizes, tenth) for name, tenth in (("fifth", 4), ("last", 9))
    }
    return {**found, "peak_resident_bytes": max(sizes)}


def _mean_of_tenth(sizes: list[int], tenth: int) -> float:
    """Of what was seen in a tenth of the time, counted from 0."""
    part = sizes[tenth * len(sizes) // 10 : (tenth + 1) * len(sizes) // 10]
    return sum(part) / max(1, len(part))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()

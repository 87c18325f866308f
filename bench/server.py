"""Serving under patches: what clients see and how long they wait while patches are applied and removed."""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch

from common import finish, new_parser, start
from stableedit_cpp import StableEdit, StableEditConfig, core, load_model
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.export.patch_recorder import PatchRecorder
from stableedit_cpp.files.digest import model_digest

sys.path.insert(0, str(Path(__file__).parents[1] / "cpp/examples/hot_edit_server"))
from client import Server

# As in the demo: so few facts allow several passes each.
_CONFIG = {"max_passes": 12, "step_size": 1.2e-3, "ridge": 300.0}


@dataclass
class Seen:
    """An answer and when its client was waiting for it."""

    sent: float
    received: float
    prompt: str
    tokens: list[int]
    version: int
    patches: tuple[str, ...]


@dataclass
class Load:
    """Clients that ask, each as soon as it has its answer, as long as the block runs."""

    server: Server
    prompts: list[str]
    tokens: int
    clients: int
    seen: list[Seen] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(seed,)) for seed in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _client(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._done.is_set():
            prompt = rng.choice(self.prompts)
            sent = time.perf_counter()
            try:
                answer = self.server.generate(prompt, self.tokens)
            except Exception as error:  # a failed request is a result
                self.failures.append(repr(error))
                continue
            version = answer["version"], tuple(answer["patches"])
            self.seen.append(Seen(sent, time.perf_counter(), prompt, answer["tokens"], *version))

    def latency(self) -> dict[str, float]:
        seconds = sorted(answer.received - answer.sent for answer in self.seen)
        quantiles = statistics.quantiles(seconds, n=100, method="inclusive")
        return {"answers": len(seconds), "p50": quantiles[49], "p99": quantiles[98], "max": seconds[-1]}


def make_patches(name: str, directory: Path, groups: dict[str, list[EditRequest]]) -> None:
    """One patch a group of facts, each made on the unedited model."""
    model, tokenizer = load_model(name)
    digest = model_digest(model)
    for patch_id, group in groups.items():
        editor = StableEdit(model, tokenizer, StableEditConfig.one_pass(turn_size=len(group), **_CONFIG))
        unedited = {module.name: module.weight.detach().clone() for module in editor.modules}
        recorder = PatchRecorder(editor, name, digest)
        editor.edit(group, progress=False)
        core.save_patch(directory / f"{patch_id}.safetensors", recorder.patch(patch_id))
        with torch.no_grad():
            for module in editor.modules:
                module.weight.copy_(unedited[module.name])


def quiet_answers(server: Server, prompts: list[str], tokens: int, patches: list[str]) -> dict[tuple, dict]:
    """What the server answers with each patch and with none, when nothing else happens; by the patches."""
    answers = {}
    for patch in [None, *patches]:
        if patch:
            server.add(f"{patch}.safetensors")
        applied = (patch,) if patch else ()
        answers[applied] = {prompt: server.generate(prompt, tokens)["tokens"] for prompt in prompts}
        if patch:
            server.remove(patch)
    return answers


def torn(answers: list[Seen], quiet: dict[tuple, dict], changes: list[dict]) -> list[str]:
    """Answers that are not those of the version they name, or of one that was not current while they were made."""
    sent = {change["version"]: change["sent"] for change in changes}
    replaced = {change["version"] - 1: change["received"] for change in changes}
    wrong = []
    for answer in answers:
        current = sent.get(answer.version, 0.0) <= answer.received
        current = current and answer.sent <= replaced.get(answer.version, float("inf"))
        if not current or answer.tokens != quiet[answer.patches][answer.prompt]:
            wrong.append(f"{answer.prompt} with version {answer.version} {answer.patches}: {answer.tokens}")
    return wrong


def weights(server: Server, modules: list[str]) -> dict[str, torch.Tensor]:
    return {module: core.parse_safetensors(server.weight(module))[0][f"{module}.weight"] for module in modules}


def change_steadily(server: Server, patches: list[str], count: int, seconds: float) -> list[dict]:
    """Applies and removes a patch ``count`` times, spread over ``seconds``."""
    changes = []
    begin = time.perf_counter()
    for number in range(2 * count):
        time.sleep(max(0.0, begin + number * seconds / (2 * count) - time.perf_counter()))
        patch = patches[number // 2 % len(patches)]
        sent = time.perf_counter()
        change = server.remove(patch) if number % 2 else server.add(f"{patch}.safetensors")
        changes.append(change | {"sent": sent, "received": time.perf_counter()})
    return changes


def spread(values: list[float], unit: float) -> dict[str, float]:
    quantiles = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": quantiles[49] * unit, "p99": quantiles[98] * unit, "max": max(values) * unit}


def main() -> None:
    parser = new_parser(
        "Clients ask hot_edit_server without a pause, first with nothing else going on, then while patches made from "
        "real facts are applied and removed.\nEvery answer is compared with the one that the server gives in peace for "
        "the version it names.",
        "server.py --server build/editable/cpp/examples/hot_edit_server/hot_edit_server --exported exported "
        "--json bench/results/server.json",
    )
    parser.add_argument("--server", required=True, metavar="FILE", help="the program")
    parser.add_argument("--exported", required=True, type=Path, metavar="DIR", help="what export_model.py wrote")
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="default 16")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="X", help="of each part (default 60)")
    parser.add_argument("--patches", type=int, default=200, metavar="N", help="applied and removed (default 200)")
    parser.add_argument("--files", type=int, default=4, metavar="N", help="different patches (default 4)")
    parser.add_argument(
        "--patch-dir", type=Path, metavar="DIR", help="keeps them, and has those of an earlier run (default: none)"
    )
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="different prompts (default 8)")
    parser.add_argument("--tokens", type=int, default=8, metavar="N", help="of an answer (default 8)")
    parser.add_argument("--concurrency", type=int, default=2, metavar="N", help="of the server (default 2)")
    options = parser.parse_args()
    device = start(options)
    manifest = json.loads((options.exported / "manifest.json").read_text())
    world = json.loads(resources.files("stableedit_cpp.data").joinpath("world_2025.json").read_text(encoding="utf-8"))
    facts = [EditRequest(**fact) for fact in world["facts"]]

    with tempfile.TemporaryDirectory() as scratch:
        directory = options.patch_dir or Path(scratch, "patches")
        directory.mkdir(exist_ok=True)
        groups = {f"facts-{index}": facts[index :: options.files] for index in range(options.files)}
        if not all((directory / f"{patch}.safetensors").exists() for patch in groups):
            make_patches(manifest["model"], directory, groups)
        patches = list(groups)
        # Prompts of every patch, so that the others' patches must leave them alone and their own must not.
        prompts = [fact.prompt for fact in facts[: options.prompts]]
        paths = {"model": options.exported, "patches": directory, "state": Path(scratch, "state")}
        with Server(options.server, **paths, concurrency=options.concurrency) as server:
            modules = [module["name"] for module in manifest["edit_modules"]]
            before = weights(server, modules)
            quiet = quiet_answers(server, prompts, options.tokens, patches)
            with Load(server, prompts, options.tokens, options.clients) as alone:
                time.sleep(options.seconds)
            base = server.call("GET", "/patches")["version"]
            with Load(server, prompts, options.tokens, options.clients) as patched:
                changes = change_steadily(server, patches, options.patches, options.seconds)
            after = weights(server, modules)
            metrics = server.send("GET", "/metrics")[1].decode()
            assert server.stop() == 0

    wrong = torn(alone.seen, quiet, []) + torn(patched.seen, quiet, changes)
    wait = next(line.split()[1] for line in metrics.splitlines() if line.startswith("hot_edit_longest_reader_wait"))
    changed = [(patch, prompt) for patch in patches for prompt in prompts if quiet[patch,][prompt] != quiet[()][prompt]]
    results = {
        "model": manifest["model"],
        "facts_a_patch": [len(group) for group in groups.values()],
        "changes": len(changes),
        "seconds_of_changes": changes[-1]["received"] - changes[0]["sent"],
        "answers_that_patches_change": f"{len(changed)} of {len(patches) * len(prompts)}",
        "versions_seen": len({answer.version for answer in patched.seen if answer.version > base}),
        "failed_requests": len(alone.failures) + len(patched.failures),
        "torn_answers": len(wrong),
        "latency_seconds_without_patching": alone.latency(),
        "latency_seconds_with_patching": patched.latency(),
        "pause_microseconds": spread([change["pause_seconds"] for change in changes], 1e6),
        "longest_wait_of_a_reader_microseconds": float(wait) * 1e6,
        "prepare_milliseconds": spread([change["prepare_seconds"] for change in changes], 1e3),
        "store_milliseconds": spread([change["store_seconds"] for change in changes], 1e3),
        "acknowledged_after_milliseconds": spread([change["received"] - change["sent"] for change in changes], 1e3),
        "weights_bit_identical": all(
            torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in modules
        ),
    }
    for problem in (alone.failures + patched.failures + wrong)[:5]:
        print(problem, file=sys.stderr)
    del options.exported, options.server, options.patch_dir, options.device  # where they are says nothing
    finish("server", options, device, results)


if __name__ == "__main__":
    main()

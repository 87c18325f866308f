"""The server under load: changes while it answers, a full queue, kill -9, the end."""

from __future__ import annotations

import contextlib
import random
import re
import threading

import torch

from support.hot_edit import (
    BUILD,
    PROMPTS,
    SERVER_TESTS,
    Refused,
    Server,
    answers,
    patched_weights,
    same_bits,
    served_weights,
)

pytestmark = SERVER_TESTS


def test_the_queue_is_bounded(options):
    with Server(BUILD / "hot_edit_server", **options, concurrency=1, queue=1) as server:
        expected = server.generate("a", 60)["tokens"]
        refused: list[Refused] = []

        def client() -> None:
            for _ in range(10):
                try:
                    assert server.generate("a", 60)["tokens"] == expected
                except Refused as refusal:
                    refused.append(refusal)

        clients = [threading.Thread(target=client) for _ in range(6)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        assert refused and {refusal.status for refusal in refused} == {503}
        assert "too many generations are waiting" in refused[0].sentence
        assert server.generate("a", 60)["tokens"] == expected


def test_generations_under_changes_see_one_version_each(server):
    quiet = {}
    for names in ("", "a", "ab"):
        for name in names[-1:]:
            server.add(f"{name}.safetensors")
        quiet[tuple(names)] = answers(server)
    server.remove("b")
    server.remove("a")
    start = served_weights(server)
    failures: list[str] = []
    seen: set[tuple[str, ...]] = set()
    done = threading.Event()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not done.is_set():
                index = rng.randrange(len(PROMPTS))
                answer = server.generate(PROMPTS[index], 8)
                version = tuple(answer["patches"])
                seen.add(version)
                if answer["tokens"] != quiet[version][index]:
                    failures.append(f"{PROMPTS[index]} with {version}: {answer['tokens']}")
        except Exception as error:
            failures.append(repr(error))

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in clients:
        thread.start()
    for _ in range(15):
        for change in (server.add, server.remove):
            change("a.safetensors" if change == server.add else "a")
        server.add("a.safetensors")
        server.add("b.safetensors")
        server.remove("b")
        server.remove("a")
    done.set()
    for thread in clients:
        thread.join()
    assert failures == []
    assert seen == set(quiet)
    assert same_bits(served_weights(server), start)


def test_kill_9_loses_nothing_that_was_acknowledged(server, options):
    rng = random.Random(0)
    bits: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    for _ in range(20):
        acknowledged, attempted = server.patches(), None
        killer = threading.Timer(rng.uniform(0.0, 0.15), server.kill)
        killer.start()
        try:
            while True:
                name = rng.choice("abc")
                attempted = [n for n in acknowledged if n != name] + [name] * (name not in acknowledged)
                change = server.remove(name) if name in acknowledged else server.add(f"{name}.safetensors")
                acknowledged = change["patches"]
                assert acknowledged == attempted
        except OSError:  # the connection broke
            killer.join()
        server.start()
        found = server.patches()
        assert found in (acknowledged, attempted)  # what was in flight has happened as a whole or not at all
        weights = served_weights(server)
        assert same_bits(weights, bits.setdefault(tuple(found), weights))
        assert [file.name for file in options["state"].glob(".*")] == []
    for name in server.patches():
        server.remove(name)
    assert same_bits(served_weights(server), patched_weights(options["patches"], ""))


def test_requests_that_have_begun_are_answered_at_the_end(options):
    with Server(BUILD / "hot_edit_server", **options) as server:
        expected = server.generate("a", 60)["tokens"]
        results = []

        def client() -> None:
            with contextlib.suppress(OSError):  # those that came too late
                while True:
                    results.append(server.generate("a", 60)["tokens"])

        clients = [threading.Thread(target=client) for _ in range(8)]
        for thread in clients:
            thread.start()
        present = 0
        while present < 4:
            metrics = server.send("GET", "/metrics")[1].decode()
            present = int(re.search(r"^hot_edit_generations (\d+)$", metrics, re.MULTILINE).group(1))
        assert server.stop() == 0
        for thread in clients:
            thread.join()
    assert len(results) >= present and all(tokens == expected for tokens in results)

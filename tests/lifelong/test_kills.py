"""A short run of the benchmark that kills a session at random instants."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "session_kills.py"


@pytest.mark.parametrize(
    ("detail", "kills"),
    [
        ("factors", 1),
        pytest.param("factors", 5, marks=pytest.mark.slow),
        pytest.param("requests", 3, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_instants(detail, kills, tmp_path):
    """The bits are those of a run that nobody killed."""
    found = tmp_path / "found.json"
    options = {"--kills": kills, "--turns": 6, "--warm-up": 2, "--snapshot-every": 3, "--detail": detail}
    options |= {"--seed": kills, "--json": found}
    command = [sys.executable, SCRIPT, *(part for option in options.items() for part in option)]
    subprocess.run(list(map(str, command)), check=True, timeout=600)
    results = json.loads(found.read_text())
    assert results["bits_equal"]
    assert results["kills"] == kills
    assert results["tensors_compared"] > 40

"""What the command line sets for its process: how threads wait, how many there are, and what the user has set."""

from __future__ import annotations

import math
import os

import pytest

from stableedit_cpp.cli import process
from stableedit_cpp.cli.process import cores, settle


@pytest.fixture
def environment(monkeypatch) -> dict[str, str]:
    """A user's environment, empty at first; many cores, of which two are granted."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(process, "cores", lambda: 2.5)
    return os.environ


def test_what_is_set(environment):
    settle()
    assert (environment["OMP_WAIT_POLICY"], environment["OMP_NUM_THREADS"]) == ("passive", "2")


@pytest.mark.parametrize("granted, threads", [(0.5, "1"), (80.0, "64"), (math.inf, None)])
def test_other_limits(environment, monkeypatch, granted, threads):
    monkeypatch.setattr(process, "cores", lambda: granted)
    settle()
    assert environment.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_how_threads_wait_is_left_to_the_user(environment, name):
    environment[name] = "the user's"
    settle()
    assert environment[name] == "the user's"
    assert "OMP_WAIT_POLICY" not in environment or name == "OMP_WAIT_POLICY"


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_how_many_threads_there_are_is_left_to_the_user(environment, name):
    environment[name] = "7"
    settle()
    assert environment[name] == "7"
    assert "OMP_NUM_THREADS" not in environment or name == "OMP_NUM_THREADS"


def group(root, path: str, **files: str) -> None:
    (root / path).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / path / f"cpu.{name}").write_text(content + "\n")


def granted(tmp_path, *lines: str) -> float:
    (tmp_path / "groups").write_text("\n".join(lines) + "\n")
    return cores(tmp_path / "groups", tmp_path)


def test_version_2(tmp_path):
    group(tmp_path, "pod/job", max="max 100000")
    assert granted(tmp_path, "0::/pod/job") == math.inf
    group(tmp_path, "pod", max="150000 50000")  # the group above
    assert granted(tmp_path, "0::/pod/job") == 3.0
    group(tmp_path, "pod/job", max="250000 100000")
    assert granted(tmp_path, "0::/pod/job") == 2.5
    assert granted(tmp_path, "0::/") == math.inf


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_version_1(tmp_path, mount):
    lines = ["5:memory:/pod", f"4:{mount}:/pod", "0::/"]
    group(tmp_path, "memory/pod", cfs_quota_us="100000", cfs_period_us="100000")
    group(tmp_path, f"{mount}/pod", cfs_quota_us="-1", cfs_period_us="100000")
    assert granted(tmp_path, *lines) == math.inf
    group(tmp_path, f"{mount}/pod", cfs_quota_us="400000", cfs_period_us="100000")
    assert granted(tmp_path, *lines) == 4.0


def test_path_of_the_host_within_a_container(tmp_path):
    group(tmp_path, "", max="200000 100000")
    assert granted(tmp_path, "0::/kubepods/pod7/container") == 2.0


def test_no_control_groups(tmp_path):
    assert cores(tmp_path / "absent", tmp_path) == math.inf
    group(tmp_path, "", max="half a file")
    assert granted(tmp_path, "0::/") == math.inf

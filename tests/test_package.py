"""libstableedit as a package for C++ projects: what is installed, and a stranger's project that uses it."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stableedit_cpp import __version__, _build_info, core
from stableedit_cpp.cli import main
from stableedit_cpp.files.environment import cmake_prefix

REPOSITORY = Path(__file__).parent.parent
CONSUMER = REPOSITORY / "cpp/examples/consumer"
# pip puts cmake beside Python.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
CMAKE = shutil.which("cmake", path=PATH)
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="needs cmake")


def cmake(*arguments: object) -> subprocess.CompletedProcess:
    command = [CMAKE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | {"PATH": PATH})


def configure(build: Path, *options: str, source: Path = CONSUMER) -> subprocess.CompletedProcess:
    torch_root = Path(torch.__file__).parent
    return cmake(
        "-S",
        source,
        "-B",
        build,
        f"-DCMAKE_PREFIX_PATH={cmake_prefix()}",
        *(options or [f"-DSTABLEEDIT_TORCH_ROOT={torch_root}"]),
    )


def test_the_prefix_is_printed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")  # it is one line on any terminal
    with pytest.raises(SystemExit) as exit_:
        main(["--cmake-prefix"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"{cmake_prefix()}\n"
    assert main(["env"]) == 0
    assert re.search(rf"^cmake prefix: +{re.escape(str(cmake_prefix()))}$", capsys.readouterr().out, re.MULTILINE)


def test_what_is_installed():
    prefix = cmake_prefix()
    headers = {path.name: path.read_text() for path in (REPOSITORY / "cpp/include/stableedit").iterdir()}
    assert headers == {path.name: path.read_text() for path in (prefix / "include/stableedit").iterdir()}
    assert (prefix / "lib/libstableedit.so").is_file()
    config = (prefix / "lib/cmake/stableedit/stableedit-config.cmake").read_text()
    assert f"stableedit {__version__} was built with torch {_build_info.torch_version}," in config
    # Nothing of the machine that it was built on.
    assert str(REPOSITORY) not in config
    assert str(REPOSITORY) not in (prefix / "lib/cmake/stableedit/stableedit-targets.cmake").read_text()


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_only_the_interface_is_exported():
    symbols = subprocess.run(
        ["nm", "--dynamic", "--defined-only", "--demangle", cmake_prefix() / "lib/libstableedit.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    functions = [line.split(" ", 2)[2] for line in symbols if line.split(" ", 2)[1] == "T"]
    assert len(functions) > 50
    assert [name for name in functions if not re.match(r"stableedit::(?!\(anonymous)", name)] == []
    assert not any("nlohmann" in line for line in symbols)
    # The headers say what is public; the helpers of the sources are not.
    assert not any("StateReader" in line or "write_atomically" in line for line in symbols)


@needs_cmake
def test_a_consumer_outside_the_tree_gets_pythons_numbers(tmp_path):
    source, build = tmp_path / "consumer", tmp_path / "build"
    shutil.copytree(CONSUMER, source)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    configured = configure(build, source=source)
    assert configured.returncode == 0, configured.stderr
    built = cmake("--build", build)
    assert built.returncode == 0, built.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, which a busy machine does not change.
    seconds = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    print(f"configured and built in {seconds:.1f} s of processor time")
    assert seconds < 60

    torch.manual_seed(1)
    given = tmp_path / "turn.safetensors"
    core.save_safetensors(given, {"keys": torch.randn(50, 24), "value_gradients": 0.01 * torch.randn(50, 16)})
    for file in (CONSUMER / "turn.safetensors", given):
        turn, _ = core.load_safetensors(file)
        keys, gradients = turn["keys"], turn["value_gradients"]
        expected = core.ModuleEditor(keys.shape[1], gradients.shape[1]).edit(keys, gradients).dense()
        done = subprocess.run([build / "consumer", file], capture_output=True, text=True, check=True)
        printed = torch.tensor([[float(number) for number in row.split()] for row in done.stdout.splitlines()])
        assert printed.shape == expected.shape
        assert (printed - expected).norm() <= 1e-6 * expected.norm()

    done = subprocess.run([build / "consumer", tmp_path / "absent"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "No such file or directory" in done.stderr


@needs_cmake
def test_another_minor_version_is_not_compatible(tmp_path):
    major, minor, patch = map(int, re.findall(r"\d+", __version__)[:3])
    fitting = [f"{major}.{minor}", f"{major}.{minor}.{patch}"]
    others = [f"{major}.{minor}.{patch + 1}", f"{major}.{minor + 1}", f"{major + 1}.{minor}"]
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22...4.0)\nproject(consumer LANGUAGES CXX)\n"
        f"foreach(wanted {' '.join(fitting + others)})\n"
        "  find_package(stableedit ${wanted} QUIET)\n"
        '  message(STATUS "${wanted}: ${stableedit_FOUND} of ${stableedit_CONSIDERED_VERSIONS}")\n'
        "endforeach()\n"
        f"find_package(stableedit {others[0]} REQUIRED)\n"
    )
    done = configure(tmp_path / "build", source=tmp_path)
    found = re.findall(r"^-- ([\d.]+): (\d) of ", done.stdout, re.MULTILINE)
    assert found == [(version, "1") for version in fitting] + [(version, "0") for version in others]
    assert done.returncode != 0
    assert f'compatible with requested version "{others[0]}"' in " ".join(done.stderr.split())


@needs_cmake
def test_another_minor_version_of_torch_is_refused(tmp_path):
    """A directory that looks like another libtorch: its version header, and empty files for what is looked for."""
    root = tmp_path / "libtorch"
    for name in ("include/ATen/core/Tensor.h", "lib/libtorch.so", "lib/libtorch_cpu.so", "lib/libc10.so"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    header = root / "include/torch/headeronly/version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 1\n#define TORCH_VERSION_MINOR 2\n#define TORCH_VERSION_PATCH 3\n")
    done = configure(tmp_path / "build", f"-DSTABLEEDIT_TORCH_ROOT={root}")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert f"was built with torch {_build_info.torch_version}" in message
    assert f"but torch 1.2.3 was found in {root}" in message

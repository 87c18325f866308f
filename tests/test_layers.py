"""The rooms of the package stand on each other: a file imports from its own room and from those below it.

Imports within functions and under TYPE_CHECKING count: what is needed by a detour is needed.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "python/stableedit_cpp"
# From the ground up; rooms of one line do not know each other. CONTRIBUTING.md says what each is for.
LAYERS = [
    ["_build_info", "_core", "errors"],
    ["_torch_check", "core", "files"],
    ["data"],
    ["model"],
    ["evaluation"],
    ["editors"],
    ["lifelong", "export"],
    ["sideeffects"],
    ["experiments"],
    ["report"],
    ["studio"],
    ["cli"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# Made when the package is built.
GENERATED = {"_build_info", "_core"}


@cache
def files() -> dict[str, Path]:
    """By dotted name within the package; a package's own name stands for its __init__.py."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(name: str) -> list[tuple[str, str, int]]:
    """(file, name in it, line) of what a file imports from the package."""
    found = []
    for node in ast.walk(ast.parse(files()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: a relative import"
            whole = node.module or ""
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            whole, names = node.names[0].name, [""]
        else:
            continue
        if whole.split(".")[0] != "stableedit_cpp":
            continue
        for one in names:
            path = f"{whole}.{one}".removeprefix("stableedit_cpp.").rstrip(".")
            if path in files() or path in GENERATED:
                found.append((path, "", node.lineno))
            else:
                found.append((path.rpartition(".")[0], path.rpartition(".")[2], node.lineno))
    return found


NAMES = sorted(name for name in files() if name)


def test_every_room_has_its_place():
    assert {name.split(".")[0] for name in NAMES} | GENERATED == set(LEVEL)


def test_a_file_imports_from_below():
    wrong = []
    for name in NAMES:
        room = name.split(".")[0]
        for other, _, line in imports(name):
            there = other.split(".")[0]
            if there and there != room and LEVEL[there] >= LEVEL[room]:
                wrong.append(f"{name}, line {line}: {room} must not know {there}")
    assert not wrong, "\n".join(wrong)


def test_a_file_takes_from_others_what_they_offer():
    wrong = []
    for name in NAMES:
        for other, what, line in imports(name):
            if what and other in files() and offered(other) is not None and what not in offered(other):
                wrong.append(f"{name}, line {line}: {what} is not in __all__ of {other}")
    assert not wrong, "\n".join(wrong)


@cache
def offered(name: str) -> list[str] | None:
    """``__all__`` of a file, if it has one that can be read off."""
    for node in ast.parse(files()[name].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return None


def test_there_are_no_circles():
    """Depth first: a file that is met again while its own imports are followed imports itself by a detour."""
    done: set[str] = set()

    def follow(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name in done or name not in files():
            return
        for other, _, _ in imports(name):
            # A package's __init__ only collects what its files offer; they import each other directly.
            if not other or other == name or files().get(other, Path("x.py")).name == "__init__.py":
                continue
            follow(other, (*way, name))
        done.add(name)

    for name in NAMES:
        if files()[name].name != "__init__.py":
            follow(name, ())

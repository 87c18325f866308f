"""How far work is: what its bar on the terminal says."""

from __future__ import annotations

from typing import NamedTuple

from tqdm import tqdm

__all__ = ["Bar", "shown_bar"]


class Bar(NamedTuple):
    """
    Attributes:
        title: "Editing". done, total: of ``unit``; the total is 0 where nobody knows it.
        rest: what else it says, "efficacy=0.93".
    """

    title: str
    done: float
    total: float
    unit: str
    rest: str


def shown_bar() -> Bar | None:
    """The bar that was opened last and is still there; None without one. Any thread may ask.

    All long work of this package has such a bar, and libraries that it calls have them, too: reading them says more
    than a second way of reporting progress would, through every function in between.
    """
    with tqdm.get_lock():
        # tqdm has no public list of its bars; without this one the page shows which job runs, and no bar.
        open_bars = [bar for bar in getattr(tqdm, "_instances", ()) if not bar.disable]
    bar = max(open_bars, key=lambda bar: bar.start_t, default=None)
    if bar is None:
        return None
    return Bar((bar.desc or "").removesuffix(": "), bar.n, bar.total or 0, bar.unit, bar.postfix or "")

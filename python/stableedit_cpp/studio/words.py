"""What the page says of the work: HTML of the jobs and of the session."""

from __future__ import annotations

import time
from html import escape

from stableedit_cpp.studio.bars import Bar
from stableedit_cpp.studio.jobs import Job, Worker
from stableedit_cpp.studio.rows import counts
from stableedit_cpp.studio.view import View

__all__ = ["WORDS_CSS", "heading", "work"]

_SHOWN = 4  # jobs that are over
_MARKS = {"done": "✓", "stopped": "■", "failed": "✗"}

WORDS_CSS = """
.work progress { width: 100%; height: .5rem; margin: .3rem 0; border: 0; border-radius: .25rem; overflow: hidden; }
.work progress[value] { appearance: none; background: var(--page); }
.work progress::-webkit-progress-bar { background: var(--page); }
.work progress::-webkit-progress-value { background: var(--link); }
.work progress::-moz-progress-bar { background: var(--link); }
.work ul { list-style: none; padding: 0; margin: .4rem 0 0; }
.work li { margin: 0; padding: .1rem 0 .1rem 1.4rem; text-indent: -1.4rem; }
.work li { overflow-wrap: anywhere; white-space: pre-line; }
.work .failed { color: var(--s1); }
.work .note, .work .waiting, .heading small { color: var(--muted); }
.heading h1 { margin: 0; font-size: 1.4rem; overflow-wrap: anywhere; }
"""


def heading(view: View) -> str:
    """The session, its model, and how many edits have which state."""
    states = ", ".join(f"{number} {state}" for state, number in counts(view.rows).items()) or "no edits yet"
    about = f"{view.model} · {view.editor} · turn {view.turn} · {states}"
    return f'<div class="heading"><h1>{escape(view.directory)}</h1><small>{escape(about)}</small></div>'


def work(worker: Worker) -> str:
    """What is done, what waits, and what came of the last jobs."""
    jobs, current = list(worker.jobs), worker.current
    said = _running(current, worker.bar) if current is not None else "<div>ready</div>"
    waiting = [job for job in jobs if job.state == "waiting"]
    over = [job for job in jobs if job.over.is_set() and not (job.quick and job.state == "done" and not job.said)]
    items = [f'<li class="waiting">… {escape(job.title)}, waits</li>' for job in waiting]
    for job in reversed(over[-_SHOWN:]):
        text = f"{job.title}: {job.said}" if job.said else job.title
        items.append(f'<li class="{job.state}">{_MARKS[job.state]} {escape(text)}</li>')
        items += [f'<li class="note">· {escape(note)}</li>' for note in job.notes]
    return f'<div class="work" aria-live="polite">{said}<ul>{"".join(items)}</ul></div>'


def _running(job: Job, bar: Bar | None) -> str:
    seconds = f"{time.monotonic() - job.begun:.0f} s" if job.begun else ""
    title = f"{job.title}, {'stops after this turn' if job.stopping else 'running'}, {seconds}"
    if bar is None:
        return f"<div>{escape(title)}</div><progress></progress>"
    amount = f"{bar.done:g} of {bar.total:g} {bar.unit}s" if bar.total else f"{bar.done:g} {bar.unit}s"
    detail = ", ".join(part for part in (amount, bar.rest) if part)
    value = f' value="{bar.done:g}" max="{bar.total:g}"' if bar.total else ""
    return f"<div>{escape(title)}<br>{escape(bar.title)}: {escape(detail)}</div><progress{value}></progress>"

"""Reads text with a model and gathers its statistics: windows of tokens, in passes that can be interrupted."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tqdm.auto import tqdm

from stableedit_cpp.data.hub import HUB_PREFIX
from stableedit_cpp.data.texts import iter_texts
from stableedit_cpp.files.atomic import check_writable_file
from stableedit_cpp.files.words import check_whole
from stableedit_cpp.model.attached import forward_hook
from stableedit_cpp.model.capture import capture
from stableedit_cpp.model.form import PARSED
from stableedit_cpp.model.logits import answer_logits
from stableedit_cpp.model.modules import EditModule, find_modules
from stableedit_cpp.model.outputs import default_edit_modules
from stableedit_cpp.model.split import refuse_split
from stableedit_cpp.model.text_statistics import Place, TextStatistics, load_statistics
from stableedit_cpp.model.tokens import TokenSequence, collate, context_length, pack, prompt_ids
from stableedit_cpp.model.untouched import input_device, untouched

__all__ = ["gather_statistics"]

_WINDOW = 512  # tokens
_A_DIMENSION = 100  # tokens of text for each dimension of the widest key
_FEW = 10  # with fewer, a second moment says more of the sample than of the model


def gather_statistics(
    model: torch.nn.Module,
    tokenizer,
    sources: Sequence[str | Path] | str | Path,
    output: str | Path,
    *,
    edit_modules: Sequence[str] | str | None = None,
    tokens: int | None = None,
    window: int | None = None,
    value_gradients: bool = True,
    field: str | None = None,
    max_tokens: int = 1024,
    overwrite: bool = False,
    progress: bool | None = None,
) -> TextStatistics:
    """Second moments of the keys of modules, and of their value gradients, over text; float64 sums.

    Every token of a window but the last is a key; windows are cut from one text each, and begin with the tokenizer's
    opening tokens where the text does. What is gathered is saved to ``output`` on the way and at the end, also after
    an error or Ctrl-C: the same call goes on from there, with the same result as one that was never stopped. With a
    larger ``tokens`` it goes on, too.

    Args:
        sources: files or data sets of the hub, see ``iter_texts``; read in this order.
        edit_modules: names or patterns (``find_modules``); None takes ``default_edit_modules``.
        tokens: stop with the pass that reaches so many, or at the end of the text; None takes 100 for each dimension of
            the widest key, 153,600 for the MLPs of SmolLM2-135M.
        window: tokens that the model sees together, at most its context; None takes 512 or the context.
        value_gradients: off, the model only runs forward, in a third of the time.
        field: of records that has the text; None takes ``Text`` or ``text``.
        max_tokens: tokens, padding included, in one forward pass; changes nothing but rounding.
        overwrite: begin anew, whatever ``output`` holds.
        progress: show a bar; None shows one on a terminal.

    Raises:
        ValueError: for text without tokens, or an ``output`` that was gathered with another model, other text or
            other settings, or is no such file.
        OSError: where a source cannot be read or ``output`` not be written.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not sources:
        raise ValueError("sources is empty; name a file with text")
    check_whole("tokens", tokens, none=True)
    check_whole("window", window, 2, none=True)
    check_whole("max_tokens", max_tokens)
    check_writable_file(output, "output")
    modules = find_modules(model, default_edit_modules(model) if edit_modules is None else edit_modules)
    refuse_split(modules, "gathering statistics of text")
    experts = [module.name for module in modules if module.is_expert]
    if experts:
        raise ValueError(f"edit_modules: {experts[0]} is one expert, which does not see every token of a text")
    limit = context_length(model) or _WINDOW
    if window is not None and window > limit:
        raise ValueError(f"window is {window}, more than the model's context of {limit}")
    fresh = TextStatistics.empty(
        model,
        tokenizer,
        modules,
        [_source(source) for source in sources],
        window or min(_WINDOW, limit),
        value_gradients=value_gradients,
    )
    found = fresh if overwrite or not Path(output).exists() else _resumed(output, fresh, modules)
    widest = max(module.shape[0] for module in modules)
    wanted = _A_DIMENSION * widest if tokens is None else tokens
    found = _gather(found, model, tokenizer, modules, sources, output, wanted, field, max_tokens, progress)
    if found.tokens == 0:
        raise ValueError(f"no text of {', '.join(map(str, sources))} has two tokens")
    if found.tokens < _FEW * widest:
        warnings.warn(
            f"{found.tokens:,} tokens are few for keys of {widest:,} dimensions; {_A_DIMENSION * widest:,} or more say "
            "more of the model and less of the sample",
            stacklevel=2,
        )
    return found


def _source(source: str | Path) -> dict[str, object]:
    """What tells it from others, wherever it lies."""
    if str(source).startswith(HUB_PREFIX):
        return {"name": str(source), "bytes": None}
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    return {"name": path.name, "bytes": path.stat().st_size}


def _resumed(output: str | Path, fresh: TextStatistics, modules: Sequence[EditModule]) -> TextStatistics:
    """What was saved there, if it is the same statistics that begin."""
    saved = load_statistics(output)
    if saved.model != fresh.model:
        raise ValueError(f"{output} was gathered with another model; choose another output, or overwrite it")
    for name, what in (("keys", "modules"), ("value_gradients", "modules with value gradients")):
        if getattr(saved, name).keys() != getattr(fresh, name).keys():
            has = ", ".join(getattr(saved, name)) or "none"
            raise ValueError(f"{output} has other {what} ({has}); choose another output, or overwrite it")
    if list(saved.sources) != list(fresh.sources) or saved.window != fresh.window:
        names = ", ".join(str(source["name"]) for source in saved.sources)
        raise ValueError(
            f"{output} was gathered over other text, or windows of other length ({names}; windows of {saved.window} "
            "tokens); choose another output, or overwrite it"
        )
    return saved.to(modules)


def _gather(
    found: TextStatistics,
    model: torch.nn.Module,
    tokenizer,
    modules: Sequence[EditModule],
    sources: Sequence[str | Path],
    output: str | Path,
    wanted: int,
    field: str | None,
    max_tokens: int,
    progress: bool | None,
) -> TextStatistics:
    take = _rows if found.value_gradients else _keys
    bar = tqdm(
        total=max(wanted, found.tokens),
        initial=found.tokens,
        desc="Statistics",
        unit="token",
        disable=None if progress is None else not progress,
    )
    saved, saved_at, took = found, time.monotonic(), 0.0
    try:
        windows = _windows(tokenizer, sources, found, field)
        with bar:
            while found.tokens < wanted and (group := list(_group(windows, max_tokens))):
                sequences, before = [sequence for sequence, _ in group], found.tokens
                found = found.added(*take(model, modules, sequences, max_tokens), group[-1][1])
                bar.update(found.tokens - before)
                # At k = 14336 a file is gigabytes: at most a tenth of the time goes into writing it.
                if time.monotonic() - saved_at > max(30.0, 10.0 * took):
                    begin = time.monotonic()
                    found.save(output)
                    saved, saved_at = found, time.monotonic()
                    took = saved_at - begin
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{found.tokens:,} of {wanted:,} tokens are in {output}; the same call goes on"
        ) from None
    finally:
        if found is not saved:
            found.save(output)
    return found


def _windows(
    tokenizer, sources: Sequence[str | Path], found: TextStatistics, field: str | None
) -> Iterator[tuple[TokenSequence, Place]]:
    """Windows that were not read yet, with the place after each."""
    start, size = found.place, found.window
    for index, source in islice(enumerate(sources), start.source, None):
        begin = start.text if index == start.source else 0
        for number, (_, text) in islice(enumerate(iter_texts(source, field)), begin, None):
            done = start.window if (index, number) == start[:2] else 0
            ids = prompt_ids(tokenizer, [text], PARSED)[0]
            for part in range(done, -(-len(ids) // size)):
                piece = tuple(ids[part * size : (part + 1) * size])
                if len(piece) > 1:
                    yield TokenSequence(piece[:-1], piece[1:]), Place(index, number, part + 1)


def _group(windows: Iterator[tuple[TokenSequence, Place]], max_tokens: int) -> Iterator[tuple[TokenSequence, Place]]:
    """As many as one forward pass holds."""
    tokens = 0
    while tokens < max_tokens and (one := next(windows, None)):
        tokens += len(one[0]) + 1  # its last one is read, but not run
        yield one


def _rows(
    model: torch.nn.Module, modules: Sequence[EditModule], windows: Sequence[TokenSequence], max_tokens: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Keys and value gradients."""
    captured = capture(model, modules, windows, max_tokens=max_tokens, micro_batch=len(windows))
    # Gradients of the mean over all of them become those of the sum.
    count = len(captured.request)
    return captured.keys, {name: gradient * count for name, gradient in captured.value_gradients.items()}


def _keys(
    model: torch.nn.Module, modules: Sequence[EditModule], windows: Sequence[TokenSequence], max_tokens: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Keys alone: forward, with the output embedding at the last token of each window."""
    found: dict[str, list[torch.Tensor]] = {module.name: [] for module in modules}
    shortened = [TokenSequence(window.ids, window.answer[-1:]) for window in windows]
    device = input_device(model)
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(torch.no_grad())
        mask: torch.Tensor

        def take(name: str, _module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).to(output.device)
            if len(rows) != mask.numel():
                raise ValueError(f"edit_modules: {name} does not see every token once, so it has no statistics")
            found[name].append(rows[mask.flatten().to(rows.device)])

        for module in modules:
            stack.enter_context(forward_hook(module.module, partial(take, module.name)))
        for indices in pack(shortened, max_tokens, device=device):
            batch = collate([shortened[index] for index in indices], device)
            mask = batch.attention_mask.bool()
            answer_logits(model, batch)
    return {name: torch.cat(rows) for name, rows in found.items()}, {}

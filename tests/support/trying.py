"""Tries an architecture: what works, and why where something does not. One row of docs/models.md."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import stableedit_cpp as se
from stableedit_cpp.evaluation.answers import answer_scores
from stableedit_cpp.export import apply_delta, change_of, export_delta, export_lora, export_model, export_patch
from stableedit_cpp.export.loading import load_export
from stableedit_cpp.lifelong import LifelongSession
from stableedit_cpp.model.capture import capture
from stableedit_cpp.model.modules import find_modules
from stableedit_cpp.model.outputs import as_patterns, default_edit_modules
from stableedit_cpp.model.running import batches
from support.architectures import build
from support.captures import MICRO_BATCH, plain_reference, sequences_of
from support.tiny import FACTS

__all__ = ["try_architecture"]

SOME = [fact | {"id": f"f{number}"} for number, fact in enumerate(FACTS) if len(fact["prompt"]) < 12]


def try_architecture(name: str, tokenizer, directory: Path) -> dict[str, object]:
    """What a row of the table says by column, and ``why`` where that is no plain yes."""
    model = build(name)
    row: dict[str, object] = {"architecture": name, "class": type(model).__name__, "why": {}}
    _say(row, "modules", "none", lambda: _modules(model, automatic=True))
    _say(row, "with a step size", "none", lambda: _modules(model, automatic=False))
    if row["modules"] != "none":
        _say(row, "edit", "no", lambda: _edit(model, tokenizer, name))
    if row.get("edit") != "yes":
        return dict.fromkeys(("edit", "evaluate", "trunk cache", "session", "export"), "-") | row
    _say(row, "evaluate", "no", lambda: _evaluate(model, tokenizer))
    _say(row, "trunk cache", "stands aside", lambda: _trunk_cache(model, tokenizer))
    _say(row, "session", "no", lambda: _session(name, tokenizer, directory / "session"))
    _export(row, name, tokenizer, directory)
    return row


def _say(row: dict[str, object], column: str, otherwise: str, check: Callable[[], str | None]) -> None:
    """What a check gives, or "yes"; where it raises ``ValueError``, the refusal of the library, what that says. A
    failed assertion is a failed test."""
    try:
        row[column] = check() or "yes"
    except ValueError as error:
        row[column], row["why"][column] = otherwise, _sentence(error)


def _sentence(error: Exception) -> str:
    """The first of it, without what is another one for each model, or each time."""
    sentence = str(error).splitlines()[0].removesuffix(" The model has:").split(": [PEFT")[0]
    sentence = re.sub(r"\bthe adapter to \S+ and \d+ more\b", "the adapter to all of these modules", sentence)
    sentence = re.sub(r"\b\S+\.experts\.down_proj\.\d+ is", "an expert is", sentence)
    return re.sub(r"\b(an? )?[A-Z]\w+For\w+(?![\w.])", "the model", sentence)


def _modules(model: nn.Module, *, automatic: bool) -> str:
    """By name, the numbers of layers and experts left out."""
    found = default_edit_modules(model, automatic=automatic)
    return as_patterns(sorted({re.sub(r"\.\d+\b", ".*", name) for name in found}))


def _config(model: nn.Module) -> se.StableEditConfig:
    """Edits all that the table names, in one turn of a step that a random model takes."""
    names: list[str] = []
    for automatic in (True, False):
        try:
            names += default_edit_modules(model, automatic=automatic)
        except ValueError:  # the table says why
            continue
    return se.StableEditConfig.one_pass(edit_modules=names, step_size=1e-2, max_passes=3)


def _edit(model: nn.Module, tokenizer, name: str) -> None:
    """Keys and gradients are those of autograd (of experts: ``test_experts.py``); the loss falls, and nothing but the
    edited weights changes."""
    editor = se.StableEdit(model, tokenizer, _config(model))
    sequences, modules = sequences_of(tokenizer, SOME), [one for one in editor.modules if not one.is_expert]
    captured = capture(model, modules, sequences, micro_batch=MICRO_BATCH, max_tokens=60)
    keys, gradients = plain_reference(model, sequences, [module.name for module in modules])
    for module in modules:
        for mine, exact in (
            (captured.keys[module.name], keys[module.name]),
            (captured.value_gradients[module.name], gradients[module.name]),
        ):
            assert (mine - exact).norm() < 1e-3 * exact.norm(), (name, module.name)
            assert exact.norm() > 0
    before, loss = copy.deepcopy(model.state_dict()), _loss(model, sequences)
    editor.edit(SOME, progress=False)
    assert _loss(model, sequences) < loss
    edited = {module.tensor_name for module in editor.modules}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) == (key not in edited), key


def _loss(model: nn.Module, sequences) -> float:
    """Mean over requests of the answer's cross-entropy, one request at a time."""
    losses = []
    for sequence in sequences:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence.ids])).logits[0, sequence.first :]
        losses.append(nn.functional.cross_entropy(logits.float(), torch.tensor(sequence.answer)))
    return torch.stack(losses).mean().item()


def _evaluate(model: nn.Module, tokenizer) -> None:
    """Scores and greedy answers, of many together, are those of one request at a time."""
    sequences = sequences_of(tokenizer, SOME)
    scores = answer_scores(model, sequences, max_tokens=300)
    for index, sequence in enumerate(sequences):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence.ids])).logits[0, sequence.first :].double()
        answer = torch.tensor(sequence.answer)
        likely = logits.log_softmax(-1).gather(1, answer[:, None]).min().exp()
        assert torch.isclose(scores.probability[index], likely, rtol=1e-3)
        assert scores.accuracy[index] == (logits.argmax(-1) == answer).double().mean()
    prompts = [fact["prompt"] for fact in SOME[:3]]
    answers = se.generate(model, tokenizer, prompts, max_new_tokens=4)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(tokenizer(prompt).input_ids)
        begin = len(ids)
        while len(ids) < begin + 4 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == tokenizer.decode(ids[begin:], skip_special_tokens=True), prompt


def _trunk_cache(model: nn.Module, tokenizer) -> None:
    """What it serves is bit for bit what is computed in full; it may stand aside."""
    sequences = sequences_of(tokenizer, SOME)
    cache = se.TrunkCache(model, find_modules(model, default_edit_modules(model, automatic=True)))
    plain, *cached = (
        [batch.logits for batch in batches(model, sequences, max_tokens=300, trunk=trunk)]
        for trunk in (None, cache, cache)
    )
    for logits in cached:
        assert all(torch.equal(mine, exact) for mine, exact in zip(logits, plain, strict=True))
    if cache.objection is not None:
        raise ValueError(cache.objection)
    assert len(cache) == len(sequences)


def _session(name: str, tokenizer, directory: Path) -> None:
    """Edit, revert one, close, and open again on the unedited model: the same bits."""
    model = build(name)
    with LifelongSession.create(directory, model, tokenizer, _config(model)) as session:
        session.edit(SOME, progress=False)
        session.revert([SOME[0]["id"]], progress=False)
        left = copy.deepcopy(session.model.state_dict())
    with LifelongSession.open(directory, build(name), tokenizer) as session:
        assert [id for id, entry in session.history.entries.items() if not entry.current] == [SOME[0]["id"]]
        assert all(torch.equal(tensor, left[key]) for key, tensor in session.model.state_dict().items())


def _export(row: dict[str, object], name: str, tokenizer, directory: Path) -> None:
    """The formats in which the edited model comes back."""
    model = build(name)
    editor = se.StableEdit(model, tokenizer, _config(model))
    editor.edit(SOME, progress=False)
    change, formats = change_of(editor), []
    checks = {"model": _export_model, "delta": _export_delta, "patch": _export_patch, "adapter": _export_adapter}
    for kind, check in checks.items():
        try:
            check(change, model, name, tokenizer, directory)
            formats.append(kind)
        except ValueError as error:
            row["why"]["export"] = f"{kind}: {_sentence(error)}"
    row["export"] = ", ".join(formats)


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 43).view(4, 10)).logits


def _export_model(_change, edited: nn.Module, _name: str, tokenizer, directory: Path) -> None:
    export_model(edited, tokenizer, directory / "model")
    loaded = type(edited).from_pretrained(directory / "model").eval()
    assert torch.equal(_logits(loaded), _logits(edited))


def _export_delta(change, edited: nn.Module, name: str, _tokenizer, directory: Path) -> None:
    export_delta(change, directory / "delta")
    base = build(name)
    apply_delta(base, directory / "delta")
    assert torch.equal(_logits(base), _logits(edited))


def _export_patch(change, edited: nn.Module, name: str, tokenizer, directory: Path) -> None:
    export_patch(change, directory / "patch")
    loaded, _ = load_export(directory / "patch", lambda *_: (build(name), tokenizer), base=name)
    assert torch.allclose(_logits(loaded), _logits(edited), atol=1e-4)


def _export_adapter(change, edited: nn.Module, name: str, tokenizer, directory: Path) -> None:
    export_lora(change, directory / "adapter", keep=1.0)
    loaded, _ = load_export(directory / "adapter", lambda *_: (build(name), tokenizer), base=name)
    assert torch.allclose(_logits(loaded), _logits(edited), atol=1e-3)

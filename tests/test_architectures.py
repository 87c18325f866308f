"""Every supported architecture: capture, edit and evaluation on a tiny random model, in all weight dtypes."""

from __future__ import annotations

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.evaluation.answers import answer_scores
from stableedit_cpp.model.capture import capture
from stableedit_cpp.model.modules import find_modules
from stableedit_cpp.model.tokens import TokenSequence
from support.captures import MICRO_BATCH, plain_reference, sequences_of
from support.tiny import ARCHITECTURES, FACTS, LAYERS, pattern_of, roomy_model, tiny_model

pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)

RECORDS = [
    fact | {"rephrase": f"So {fact['prompt']}", "locality_prompt": "Sugar is", "locality_target": "sweet"}
    for fact in FACTS
]


def edit(model, tokenizer, architecture, **changes) -> tuple[se.StableEdit, se.EditReport]:
    """Two turns, the second incomplete, of a step size that suits these models."""
    config = {"edit_modules": pattern_of(architecture), "step_size": 1e-2, "turn_size": 7} | changes
    editor = se.StableEdit(model, tokenizer, se.StableEditConfig.one_pass(**config))
    return editor, editor.edit(FACTS)


def test_the_default_editor_takes(architecture, tokenizer):
    """With no setting, whatever scale loss and gradients have and however much alike the keys are: the free answers are
    the targets, and stop. But of MPT an MLP: the guard ends a turn over attention outputs of this random model."""
    model = roomy_model(architecture)
    facts = [fact for fact in FACTS if fact["target"] in ("Au", "A", "4")]
    unedited = se.evaluate(model, tokenizer, facts, metrics=["generation"], progress=False)
    modules = pattern_of(architecture).replace("*", str(LAYERS - 1)) if architecture == "mpt" else None
    se.StableEdit(model, tokenizer, se.StableEditConfig(edit_modules=modules)).edit(facts, progress=False)
    scores = se.evaluate(model, tokenizer, facts, metrics=["generation"], progress=False)
    assert (unedited["efficacy_free"].mean, scores["efficacy_free"].mean) == (0.0, 1.0)


def mean_loss(model, sequences) -> float:
    """Mean over requests of the answer's cross-entropy, one request at a time."""
    losses = []
    for sequence in sequences:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence.ids])).logits[0, sequence.first :]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(sequence.answer)))
    return torch.stack(losses).mean().item()


def accuracy_of_one(model, sequence: TokenSequence) -> float:
    with torch.no_grad():
        choice = model(input_ids=torch.tensor([sequence.ids])).logits[0, sequence.first :].argmax(-1)
    return (choice == torch.tensor(sequence.answer)).double().mean().item()


def test_capture_agrees_with_autograd(architecture, tokenizer):
    model, sequences = tiny_model(architecture, torch.float64), sequences_of(tokenizer)
    modules = find_modules(model, pattern_of(architecture))
    assert len(modules) == LAYERS
    captured = capture(model, modules, sequences, micro_batch=MICRO_BATCH, max_tokens=120)
    keys, gradients = plain_reference(model, sequences, [module.name for module in modules])
    for name in keys:
        for mine, exact in ((captured.keys[name], keys[name]), (captured.value_gradients[name], gradients[name])):
            # Some architectures normalise in float32 whatever the dtype of the model.
            assert (mine - exact).norm() < 1e-5 * exact.norm(), name
            assert exact.norm() > 1e-3


def test_edit(architecture, tokenizer):
    """The loss on the edits falls, and nothing but the edited weights changes, by as much as the report says."""
    model, sequences = tiny_model(architecture), sequences_of(tokenizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = mean_loss(model, sequences)
    editor, report = edit(model, tokenizer, architecture)
    assert report.edits == len(FACTS)
    assert [turn.requests for turn in report.turns] == [7, 6]
    assert mean_loss(model, sequences) < loss - 0.05
    edited = {f"{module.name}.weight" for module in editor.modules}
    assert len(edited) == LAYERS
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in edited), name


def test_more_passes_learn_more(architecture, tokenizer):
    model, once, sequences = tiny_model(architecture), tiny_model(architecture), sequences_of(tokenizer)
    _, report = edit(model, tokenizer, architecture, max_passes=8)
    edit(once, tokenizer, architecture)
    assert report.turns[0].passes > 1  # up to the best one of eight
    assert mean_loss(model, sequences) < mean_loss(once, sequences) - 0.1
    assert se.evaluate(model, tokenizer, FACTS).efficacy > 0.05


def test_evaluation_is_that_of_single_requests(architecture, tokenizer):
    """On an edited model, whose scores are not all zero; large and small forward passes."""
    model = tiny_model(architecture)
    edit(model, tokenizer, architecture, max_passes=8)
    expected = {
        "efficacy": sequences_of(tokenizer),
        "generalization": sequences_of(tokenizer, [r | {"prompt": r["rephrase"]} for r in RECORDS]),
        "specificity": sequences_of(tokenizer, [{"prompt": "Sugar is", "target": "sweet"}] * len(FACTS)),
    }
    expected = {metric: [accuracy_of_one(model, s) for s in sequences] for metric, sequences in expected.items()}
    for max_tokens in (2048, 50):
        scores = se.evaluate(model, tokenizer, RECORDS, max_tokens_per_forward=max_tokens)
        for metric, values in expected.items():
            assert [record[metric] for record in scores.per_request] == pytest.approx(values)
            assert getattr(scores, metric) == pytest.approx(sum(values) / len(values))


def test_accuracy_of_answers_that_are_partly_right(architecture, tokenizer):
    """Answers made of the model's own choices, every third token replaced: between 0 and 1 for every request."""
    model = tiny_model(architecture)
    sequences = []
    for index, sequence in enumerate(sequences_of(tokenizer)):
        ids, answer = list(sequence.ids[: sequence.first + 1]), []
        for position in range(3 + index % 4):
            with torch.no_grad():
                choice = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            answer.append(choice if position % 3 else (choice + 1) % 250)
            ids.append(answer[-1])
        sequences.append(TokenSequence(tuple(ids[:-1]), tuple(answer)))
    expected = [accuracy_of_one(model, sequence) for sequence in sequences]
    assert min(expected) > 0 and max(expected) < 1
    for max_tokens in (1, 100, 10_000):
        assert answer_scores(model, sequences, max_tokens=max_tokens).accuracy.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_live_weight_is_the_master_rounded_once(architecture, dtype, tokenizer):
    model = tiny_model(architecture, dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    editor, report = edit(model, tokenizer, architecture)
    assert report.edits == len(FACTS)
    for module in editor.modules:
        weight = editor.weights[module.name]
        assert weight.live.data_ptr() == module.weight.data_ptr()
        assert module.weight.dtype == dtype
        assert weight.master.dtype == torch.float32
        assert torch.equal(module.weight.detach(), weight.master.to(dtype))
        assert not torch.equal(module.weight.detach(), before[f"{module.name}.weight"])
        rounded_away = not torch.equal(weight.master, module.weight.detach().float())
        assert rounded_away == (dtype != torch.float32)
    for name, tensor in model.state_dict().items():
        if name not in {f"{module.name}.weight" for module in editor.modules}:
            assert torch.equal(tensor, before[name]), name

"""MEMIT and AlphaEdit against the dense formulas of their released code, in float64, on tiny models."""

from __future__ import annotations

import copy

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.core import PastKeys
from stableedit_cpp.editors import families
from stableedit_cpp.model.gather import gather_statistics
from stableedit_cpp.model.text_statistics import load_statistics
from support.editors import assert_same_bits
from support.faults import everything, fails_without_a_trace
from support.located import CONTEXTS, FACTS, located, options, plain_turn
from support.tiny import roomy_model, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few for keys")

MODULES = {
    "gpt2": [f"transformer.h.{layer}.mlp.c_proj" for layer in (0, 1)],
    "llama": [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)],
}
LAYERS = {"gpt2": "transformer.h", "llama": "model.layers"}
TEXT = [f"Line {number} says that {number} times {number} is {number * number}." for number in range(40)]


def make(directory, editor=se.MEMIT, architecture="llama", dtype=torch.float64, model=None, guard=None, **changes):
    """An editor of a tiny model with statistics of ``TEXT``, which are gathered once a directory."""
    model = tiny_model(architecture, dtype) if model is None else model
    file = directory / f"{architecture}-{dtype}.txt"
    if not file.exists():
        file.write_text("\n".join(TEXT))
    how = {"edit_modules": MODULES[architecture], "contexts": CONTEXTS, "target_steps": 6, "turn_size": 3}
    how |= {"text_statistics": str(file.with_suffix(".safetensors")), "texts": [str(file)], "end_of_answer": False}
    return editor(model, tiny_tokenizer(), editor.config_class(**(how | changes)), guard=guard)


def moments_of(editor) -> dict[str, torch.Tensor]:
    found = load_statistics(editor.config.text_statistics)
    return {module.name: found.second_moment(module.name) for module in editor.modules}


def difference(model, other, names) -> float:
    weights = [(model.get_submodule(name).weight, other.get_submodule(name).weight) for name in names]
    return max(((mine - theirs).norm() / theirs.norm()).item() for mine, theirs in weights)


class Memit:
    """The released rule; ``sequence`` adds the keys of earlier turns (MEMIT_seq)."""

    def __init__(self, moments, weight, *, sequence=False):
        self.moments, self.weight, self.sequence = moments, weight, sequence
        self.past = {name: torch.zeros_like(moment) for name, moment in moments.items()}

    def __call__(self, name, keys, residuals):
        moment = self.weight * self.moments[name]
        system = moment + self.past[name] + keys.T @ keys + 1e-6 * moment.diagonal().mean() * torch.eye(len(moment))
        if self.sequence:
            self.past[name] = self.past[name] + keys.T @ keys
        return torch.linalg.solve(system, keys.T @ residuals)


class Alpha:
    """The released rule: solve(P (K K^T + Cp) + L2 I, P K R^T)."""

    def __init__(self, moments, threshold, ridge=10.0):
        self.ridge, self.projectors = ridge, {}
        self.past = {name: torch.zeros_like(moment) for name, moment in moments.items()}
        for name, moment in moments.items():
            values, vectors = torch.linalg.eigh(moment)
            free = vectors[:, values < threshold * values.mean()]
            assert 0 < free.shape[1] < len(moment)
            self.projectors[name] = free @ free.T

    def __call__(self, name, keys, residuals):
        p, second = self.projectors[name], keys.T @ keys
        system = p @ (second + self.past[name]) + self.ridge * torch.eye(len(p))
        self.past[name] = self.past[name] + second
        return torch.linalg.solve(system, p @ keys.T @ residuals)


RULES = {
    "memit": (se.MEMIT, {"text_weight": 2.0}, lambda moments: Memit(moments, 2.0)),
    "memit-seq": (
        se.MEMIT,
        {"text_weight": 2.0, "past_key_weight": 1.0},
        lambda moments: Memit(moments, 2.0, sequence=True),
    ),
    "alphaedit": (se.AlphaEdit, {"threshold": 0.5, "ridge": 0.1}, lambda moments: Alpha(moments, 0.5, 0.1)),
}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("which", RULES)
def test_two_turns_are_those_of_the_dense_formula_in_plain_loops(which, architecture, tmp_path):
    cls, changes, rule = RULES[which]
    editor = make(tmp_path, cls, architecture, **changes)
    plain, how = tiny_model(architecture, torch.float64), options(target_steps=6)
    dense = rule(moments_of(editor))
    editor.edit(FACTS, progress=False)
    for begin in (0, 3):
        facts = located(tiny_tokenizer(), FACTS[begin : begin + 3])
        plain_turn(plain, facts, how, LAYERS[architecture], MODULES[architecture], dense)
    assert difference(plain, tiny_model(architecture, torch.float64), MODULES[architecture]) > 1e-3
    assert difference(editor.model, plain, MODULES[architecture]) < 1e-6


def test_directions_that_alphaedit_projects_out_are_untouched(tmp_path):
    editor = make(tmp_path, se.AlphaEdit, threshold=0.5, ridge=0.1)
    moments = moments_of(editor)
    editor.edit(FACTS, progress=False)
    for name, change in editor.weight_changes().items():
        values, vectors = torch.linalg.eigh(moments[name])
        text = vectors[:, values >= 0.5 * values.mean()]
        assert 0 < text.shape[1] < len(values)
        assert change.norm() > 1e-3
        assert (change @ text).norm() < 1e-6 * change.norm()
        leak = torch.trace(change @ moments[name] @ change.T)
        assert leak <= 0.5 * values.mean() * change.norm() ** 2


@pytest.mark.parametrize("which", ["memit-seq", "alphaedit"])
def test_two_turns_of_50_are_one_of_100_at_equal_targets(which, tmp_path):
    cls, changes, _ = RULES[which]
    name = MODULES["llama"][0]
    torch.manual_seed(0)
    keys, targets = torch.randn(100, 24, dtype=torch.float64), torch.randn(100, 16, dtype=torch.float64)

    def solved(*turns):
        solver = make(tmp_path, cls, **changes).solver
        change = torch.zeros(16, 24, dtype=torch.float64)
        for begin, end in turns:
            residuals = targets[begin:end] - keys[begin:end] @ change.T
            update, used = solver.solve_located(name, keys[begin:end], residuals)
            solver.past_keys[name].update(used)
            change = change + update.dense()
        return change

    if which == "alphaedit":  # what lies outside of the null space is not there for it
        keys = make(tmp_path, cls, **changes).solver.spaces[name].project(keys)
    whole = solved((0, 100))
    assert (solved((0, 50), (50, 100)) - whole).norm() < 1e-6 * whole.norm()


def test_memit_is_alphaedit_with_everything_free_and_seeded_past_keys(tmp_path):
    memit = make(tmp_path, text_weight=2.0, ridge=1e-10)
    alpha = make(tmp_path, se.AlphaEdit, threshold=1e6, ridge=1e-10)
    for name, moment in moments_of(memit).items():
        assert alpha.solver.spaces[name].rank == 24
        alpha.solver.past_keys[name].restore(PastKeys.seeded(moment, 2.0))
    for editor in (memit, alpha):
        editor.edit(FACTS[:3], progress=False)
    assert difference(alpha.model, memit.model, MODULES["llama"]) < 1e-6


def test_without_weight_on_text_memit_is_least_squares_through_all_keys(tmp_path):
    editor = make(tmp_path, text_weight=1e-9)
    seen = []
    editor.on_turn = seen.append
    editor.edit(FACTS[:3], progress=False)
    (applied,) = seen[0].passes
    for name, update in applied.updates.items():
        wanted = -applied.captured.value_gradients[name]
        assert torch.allclose(applied.captured.keys[name] @ update.dense().T, wanted, atol=1e-5)


def test_keys_are_the_same_after_the_turn(tmp_path):
    """So that past keys need no further look at the edited model, as released code has it."""
    editor = make(tmp_path)
    seen = []
    editor.on_turn = seen.append
    editor.edit(FACTS[:3], progress=False)
    requests = seen[0].requests
    prefixes = editor.locator.prefixes(requests, [""] * 3)
    for module in editor.modules:
        after, _ = editor.locator.look(module, prefixes)
        assert torch.allclose(after, seen[0].passes[0].captured.keys[module.name], rtol=1e-6, atol=1e-9)


def test_variants_are_rows_of_their_own(tmp_path):
    editor = make(tmp_path, past_key_weight=1.0)
    seen = []
    editor.on_turn = seen.append
    fact = FACTS[0] | {"variants": ["Peru has a capital:"]}
    editor.edit([fact, FACTS[1]], progress=False)
    assert seen[0].passes[0].request.tolist() == [0, 0, 1]
    assert editor.past_keys[MODULES["llama"][0]].count == 1 + 3
    editor.repair([FACTS[1]], progress=False)
    assert editor.past_keys[MODULES["llama"][0]].count == 1 + 3  # a repair is no new key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [se.MEMIT, se.AlphaEdit])
def test_other_dtypes(cls, dtype, tmp_path):
    editor = make(tmp_path, cls, dtype=dtype)
    report = editor.edit(FACTS, progress=False, outcomes=True)
    assert len(report.turns) == 2
    assert all(torch.isfinite(change).all() and change.any() for change in editor.weight_changes().values())


def test_a_sketch_of_past_keys_is_nearly_the_same(tmp_path):
    exact, sketch = (make(tmp_path, se.AlphaEdit, threshold=0.5, sketch_rank=rank) for rank in (None, 8))
    for editor in (exact, sketch):
        editor.edit(FACTS, progress=False)
    assert sketch.past_keys[MODULES["llama"][0]].rank == 8
    assert difference(sketch.model, exact.model, MODULES["llama"]) < 1e-6  # five keys are no more than it holds


class TestATurn:
    def test_fails_without_a_trace(self, tmp_path, monkeypatch):
        editor = make(tmp_path, se.AlphaEdit, dtype=torch.float32, target_steps=2, contexts=[])
        editor.edit(FACTS[:2], progress=False)
        found = fails_without_a_trace(editor, lambda: editor.edit(FACTS[2:4], progress=False), monkeypatch)
        assert found > 2 * 3 * len(MODULES)

    def test_is_made_smaller_or_refused_by_the_guard(self, tmp_path):
        editor = make(tmp_path, text_weight=0.01, dtype=torch.float32)
        editor.guard = se.LocalityGuard(editor, ["Say", "Once"], limit=100.0)
        editor.edit(FACTS[:3], progress=False)
        free = editor.guard.drift().mean
        editor = make(tmp_path, text_weight=0.01, dtype=torch.float32)
        editor.guard = se.LocalityGuard(editor, ["Say", "Once"], limit=0.6 * free, back_offs=6)
        report = editor.edit(FACTS[:3], progress=False)
        assert report.back_offs > 0 and editor.guard.drift().mean <= 0.6 * free
        before = everything(editor)
        editor.guard.limit, editor.guard.back_offs = 1e-9, 1
        with pytest.raises(se.DriftLimitReached):
            editor.edit(FACTS[3:], progress=False)
        assert_same_bits(everything(editor), before)

    def test_says_what_it_found(self, tmp_path):
        editor = make(tmp_path)
        report = editor.edit(FACTS[:3], progress=False, outcomes=True)
        (turn,) = report.turns
        scores = se.evaluate(tiny_model("llama", torch.float64), tiny_tokenizer(), FACTS[:3], chat_template=False)
        assert turn.efficacy_before == pytest.approx(scores.efficacy, abs=1e-6)
        assert turn.answer_tokens == sum(len(f" {fact['target']}") for fact in FACTS[:3])
        assert {"targets", "capture", "mathematics", "apply"} <= turn.seconds.keys()
        assert turn.failed is not None and turn.passes == 1


class TestContexts:
    def test_are_sampled_once_with_a_seed_and_stay_in_the_config(self, tmp_path):
        editor, other = make(tmp_path, contexts=None), make(tmp_path, contexts=None)
        assert len(editor.config.contexts) == 5
        assert all(text.endswith(". ") for text in editor.config.contexts)
        assert editor.config.contexts[0].startswith("The")
        assert editor.config == other.config
        assert make(tmp_path, contexts=None, seed=1).config.contexts != editor.config.contexts
        assert type(editor.config).from_json(editor.config.to_json()) == editor.config

    def test_may_be_none(self, tmp_path):
        editor = make(tmp_path, contexts=[])
        editor.edit(FACTS[:3], progress=False)
        assert editor.locator.contexts == ("",)

    def test_neither_the_random_state_nor_the_model_is_touched(self, tmp_path):
        make(tmp_path)
        model = tiny_model("llama", torch.float64)
        torch.manual_seed(5)
        wanted = torch.rand(3)
        torch.manual_seed(5)
        editor = make(tmp_path, model=model, contexts=None)
        assert torch.equal(torch.rand(3), wanted)
        assert_same_bits(dict(editor.model.state_dict()), dict(tiny_model("llama", torch.float64).state_dict()))


class TestRefused:
    """One sentence each, and nothing is changed."""

    @pytest.mark.parametrize(
        ("record", "words"),
        [
            ({"subject": None}, r"request 1 \(b\): it has no subject.* add the field 'subject'"),
            ({"subject": "Silver"}, r"request 1 \(b\): the subject 'Silver' does not occur in the prompt 'Gold is'"),
            ({"variants": ["It shines:"]}, r"request 1 \(b\), variant 0: the subject 'gold' does not occur"),
        ],
    )
    def test_requests(self, record, words, tmp_path):
        editor = make(tmp_path)
        before = everything(editor)
        with pytest.raises(ValueError, match=words):
            editor.edit([FACTS[0], FACTS[1] | record], progress=False)
        assert_same_bits(everything(editor), before)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"text_statistics": None}, "MEMIT needs the second moments of keys over text.*stableedit statistics"),
            ({"edit_modules": ["*.0.mlp.down_proj", "*.0.self_attn.o_proj"]}, "one module a layer"),
            ({"edit_modules": ["*.2.mlp.down_proj"]}, "model.layers.2.mlp.down_proj is in the last layer"),
            ({"edit_modules": ["*.0.mlp.up_proj"]}, "does not write into the residual stream"),
            ({"edit_modules": ["lm_head"]}, "lm_head do not lie in one list of layers"),
            ({"max_passes": 2}, "max_passes has no meaning for the editor 'memit'"),
            ({"anchors": 3}, "anchors has no meaning"),
            ({"step_size": "auto"}, "step_size must be a share"),
            ({"text_weight": 0.0}, "text_weight must be greater than 0"),
            ({"target_kl": -1.0}, "target_kl must be at least 0"),
            ({"contexts": [1]}, "contexts must be a list of texts"),
        ],
    )
    def test_settings(self, changes, words, tmp_path):
        with pytest.raises(ValueError, match=words):
            make(tmp_path, **changes)

    def test_statistics_that_are_not_there(self, tmp_path):
        with pytest.raises(OSError):
            make(tmp_path, text_statistics=str(tmp_path / "none.safetensors"), texts=None)

    def test_statistics_of_another_model_or_module(self, tmp_path):
        make(tmp_path)
        with pytest.raises(ValueError, match="gathered with a model with other weights"):
            make(tmp_path, model=tiny_model("llama", torch.float64, seed=1))
        with pytest.raises(ValueError, match=r"has no statistics of model.layers.1.self_attn.o_proj"):
            make(tmp_path, edit_modules=["model.layers.1.self_attn.o_proj"])

    def test_a_threshold_that_leaves_nothing(self, tmp_path):
        with pytest.raises(ValueError, match=r"model.layers.0.mlp.down_proj: .*leaves no null space"):
            make(tmp_path, se.AlphaEdit, threshold=1e-12)

    def test_a_state_of_other_statistics(self, tmp_path):
        editor = make(tmp_path)
        other = tmp_path / "other"
        other.mkdir()
        text = other / "text.txt"
        text.write_text("Quite another text, as long as that. " * 40)
        how = {"text_statistics": str(other / "text.safetensors"), "texts": [str(text)]}
        with pytest.raises(ValueError, match="made with other text statistics"):
            make(tmp_path, **how).load_state_dict(editor.state_dict())


class TestSettings:
    @pytest.mark.parametrize("family", families.FAMILIES)
    @pytest.mark.parametrize("config", [se.MEMITConfig, se.AlphaEditConfig])
    def test_published_ones_are_of_a_family(self, config, family):
        found = config.published(family, text_statistics="s")
        assert len(found.edit_modules) in (5, 6)
        assert not found.end_of_answer and found.chat_template is False
        assert found.target_kl == 0.0625

    def test_by_hand(self):
        assert se.MEMITConfig.published("gpt2-xl").text_weight == 20000.0
        assert se.MEMITConfig.published("llama-3-8b").target_learning_rate == 0.1
        alpha = se.AlphaEditConfig.published("gpt-j-6b")
        assert (alpha.threshold, alpha.threshold_mode, alpha.ridge, alpha.past_key_weight) == (
            2e-2,
            "absolute",
            10.0,
            1.0,
        )
        assert alpha.edit_modules[0] == "transformer.h.3.mlp.fc_out" and len(alpha.edit_modules) == 6
        assert se.AlphaEditConfig.published("qwen2.5-7b").edit_modules[0] == "model.layers.7.mlp.down_proj"
        with pytest.raises(ValueError, match=r"unknown model family 'llama-3'.*llama-3-8b"):
            se.MEMITConfig.published("llama-3")

    def test_default_modules(self):
        assert families.located_modules(tiny_model("llama")) == ["model.layers.0.mlp.down_proj"]
        published = copy.deepcopy(roomy_model("gpt2"))
        published.config.n_layer = 48  # says so, but has not: nothing of the published list is there
        assert families.located_modules(published) == ["transformer.h.0.mlp.c_proj"]

    def test_names(self):
        for name in ("memit", "memit-seq", "alphaedit"):
            assert name in se.EDITORS and not se.EDITORS[name].warm_up
        assert se.EDITORS["memit-seq"].config.past_key_weight == 1.0


def test_the_file_is_gathered_where_it_is_not_there_and_read_where_it_is(tmp_path):
    first = make(tmp_path)
    path = first.config.text_statistics
    wanted = gather_statistics(
        tiny_model("llama", torch.float64),
        tiny_tokenizer(),
        first.config.texts,
        tmp_path / "again.safetensors",
        edit_modules=MODULES["llama"],
        value_gradients=False,
        progress=False,
    )
    for name, moment in moments_of(first).items():
        assert torch.equal(moment, wanted.second_moment(name))
    (tmp_path / "llama-torch.float64.txt").write_text("something else")
    assert make(tmp_path).config.text_statistics == path

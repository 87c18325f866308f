"""Editors that train: against Adam by hand and peft's own merge, with and without kept trunk outputs, and as any other
editor: all or nothing, saved, guarded."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.data.request import as_requests
from stableedit_cpp.errors import ModelBroken
from stableedit_cpp.evaluation.answers import greedy_answers
from support.editors import MODULES, assert_same_bits, make, state_of
from support.tiny import FACTS, pattern_of, roomy_model, tiny_model

LLAMA = MODULES[1:]
KINDS = [(se.FineTune, se.FineTuneConfig), (se.LoRA, se.LoRAConfig)]


def trained(tokenizer, model=None, editor=se.FineTune, guard=None, **changes):
    config = dict(KINDS)[editor]
    settings = {"edit_modules": LLAMA, "turn_size": len(FACTS), "stop_when_taken": False, "epochs": 3}
    model = tiny_model("llama") if model is None else model
    return editor(model, tokenizer, config(**(settings | changes)), guard=guard)


def by_hand(model, names, sequences, lr, batches, *, average="sample", prompt_last=False, clamp=None) -> list[float]:
    """Adam on the weights, one sequence after the other through the whole model; returns the loss of each batch."""
    weights = [model.get_submodule(name).weight for name in names]
    start = [weight.detach().clone() for weight in weights]
    adam = torch.optim.Adam(weights, lr=lr)
    losses = []
    for batch in batches:
        adam.zero_grad()
        tokens = sum(len(sequences[index].answer) for index in batch)
        loss = 0.0
        for index in batch:
            one = sequences[index]
            logits = model(input_ids=torch.tensor([one.ids])).logits[0]
            rows = logits[[one.first] * len(one.answer)] if prompt_last else logits[one.first :]
            each = torch.nn.functional.cross_entropy(rows, torch.tensor(one.answer), reduction="sum")
            loss = loss + (each / tokens if average == "token" else each / len(one.answer) / len(batch))
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
        if clamp is not None:
            with torch.no_grad():
                for weight, was in zip(weights, start, strict=True):
                    weight.copy_(torch.maximum(torch.minimum(weight, was + clamp), was - clamp))
    return losses


class TestFineTuneIsAdam:
    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    @pytest.mark.parametrize(
        "how",
        [{}, {"average": "token"}, {"objective": "prompt_last"}, {"clamp": 2e-3}, {"end_of_answer": False}],
        ids=["default", "token", "prompt_last", "clamp", "no end"],
    )
    def test_for_three_epochs_of_two_batches(self, architecture, how, tokenizer):
        model = tiny_model(architecture, torch.float64)
        reference = copy.deepcopy(model)
        names = LLAMA if architecture == "llama" else ["transformer.h.1.mlp.c_proj"]
        settings = {"edit_modules": names, "step_size": 1e-2, "shuffle": False, "micro_batch": 8, "stop_loss": 0.0}
        editor = trained(tokenizer, model, max_tokens_per_forward=100, **settings, **how)
        report = editor.edit(FACTS, progress=False)
        batches = [list(range(8)), list(range(8, 13))] * 3
        hand = {"average": how.get("average", "sample"), "clamp": how.get("clamp")}
        hand["prompt_last"] = "objective" in how
        sequences = editor.tokenize(as_requests(FACTS))
        losses = by_hand(reference, names, sequences, 1e-2, batches, **hand)
        # Llama's norms compute in float32 whatever the model's dtype, and Adam divides small gradients by their size.
        tolerance = 1e-9 if architecture == "gpt2" else 5e-6
        for name in names:
            expected = reference.get_submodule(name).weight
            assert torch.allclose(model.get_submodule(name).weight, expected, rtol=0, atol=tolerance)
        epochs = [(8 * first + 5 * second) / 13 for first, second in zip(losses[::2], losses[1::2], strict=True)]
        assert report.turns[0].losses == pytest.approx(epochs, rel=1e-6)

    def test_every_epoch_has_an_order_of_its_own_that_is_that_of_the_turn(self, tokenizer):
        first, again, other = (trained(tokenizer, shuffle=shuffle, micro_batch=4) for shuffle in (True, True, False))
        found = [editor.edit(FACTS, progress=False).turns[0].losses for editor in (first, again, other)]
        assert found[0] == found[1] != found[2]

    def test_a_small_loss_is_no_step_and_the_last_epoch(self, tokenizer):
        editor = trained(tokenizer, stop_loss=100.0)
        before = state_of(editor)
        report = editor.edit(FACTS, progress=False)
        assert len(report.turns[0].losses) == 1
        assert_same_bits({n: t for n, t in state_of(editor).items() if n in before}, before)


@pytest.mark.parametrize("editor", [se.FineTune, se.LoRA])
def test_losses_are_the_same_with_and_without_kept_trunk_outputs(editor, tokenizer):
    settings = {"step_size": 1e-3, "epochs": 8, "micro_batch": 5, "edit_modules": MODULES[2:]}
    kept, full = (trained(tokenizer, roomy_model("llama"), editor, **settings) for _ in range(2))
    assert kept.trunk is not None
    full.trunk = None
    losses = [one.edit(FACTS, progress=False).turns[0].losses for one in (kept, full)]
    assert kept.trunk.in_use
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 8 and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize(("editor", "step"), [(se.FineTune, 1e-3), (se.LoRA, 5e-3)], ids=["fine-tune", "lora"])
def test_greedy_answers_are_the_targets_and_end(editor, step, tokenizer):
    model, names = roomy_model("gpt2"), [pattern_of("gpt2")]
    how = {"edit_modules": names, "step_size": step, "epochs": 100, "stop_when_taken": True}
    one = trained(tokenizer, model, editor, **how)
    report = one.edit(FACTS[:6], outcomes=True, progress=False)
    assert not report.failed and len(report.turns[0].losses) < 100
    asked = one.tokenize(as_requests(FACTS[:6]))
    assert all(sequence.answer[-1] == tokenizer.eos_token_id for sequence in asked)
    assert greedy_answers(model, asked, max_tokens=512) == [sequence.answer for sequence in asked]
    scores = se.evaluate(model, tokenizer, FACTS[:6], metrics=["generation"], end_of_answer=True, progress=False)
    assert scores.means()["efficacy_free"] == 1.0


class TestLoRA:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    @pytest.mark.parametrize("merge", [1.0, 0.25, 0.0])
    def test_is_what_peft_trains_and_merges(self, merge, architecture, dtype, tokenizer):
        from peft import LoraConfig, get_peft_model

        names = LLAMA if architecture == "llama" else [f"transformer.h.{i}.mlp.c_proj" for i in (1, 2)]
        model = tiny_model(architecture, dtype)
        base, before = copy.deepcopy(model), copy.deepcopy(model)
        settings = {"edit_modules": names, "step_size": 1e-2, "shuffle": False, "epochs": 10, "stop_loss": 0.0}
        editor = trained(tokenizer, model, se.LoRA, rank=3, alpha=6.0, merge=merge, **settings)
        sequences = editor.tokenize(as_requests(FACTS))
        began: list[tuple[torch.Tensor, torch.Tensor]] = []
        seen = editor.solver.make_trainable

        def watched(weights):
            found = seen(weights)
            began.extend((p.detach().clone(),) for p in found.parameters)
            return found

        editor.solver.make_trainable = watched
        editor.edit(FACTS, progress=False)

        conv = architecture == "gpt2"
        adapted = get_peft_model(
            base,
            LoraConfig(r=3, lora_alpha=6.0, target_modules=names, fan_in_fan_out=conv),
            autocast_adapter_dtype=False,
        )
        parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter, (start,) in zip(parameters, began, strict=True):
                parameter.copy_(start)
        adapted.eval()
        adam = torch.optim.Adam(parameters, lr=1e-2)
        for _ in range(10):
            for batch in (sequences[:10], sequences[10:]):
                adam.zero_grad()
                for one in batch:
                    logits = adapted(input_ids=torch.tensor([one.ids])).logits[0, one.first :]
                    (torch.nn.functional.cross_entropy(logits, torch.tensor(one.answer)) / len(batch)).backward()
                adam.step()
        merged = adapted.merge_and_unload()
        for name in names:
            old = before.get_submodule(name).weight.detach()
            expected = old + merge * (merged.get_submodule(name).weight.detach() - old)
            assert torch.allclose(model.get_submodule(name).weight, expected, rtol=0, atol=1e-5)
            assert torch.equal(model.get_submodule(name).weight, old) == (merge == 0.0)

    def test_leaves_nothing_of_peft_in_the_model(self, tokenizer):
        editor = trained(tokenizer, editor=se.LoRA)
        names = [name for name, _ in editor.model.named_modules()]
        types = [type(module) for module in editor.model.modules()]
        editor.edit(FACTS, progress=False)
        assert [name for name, _ in editor.model.named_modules()] == names
        assert [type(module) for module in editor.model.modules()] == types
        assert not any("forward" in vars(module) for module in editor.model.modules())
        assert all(parameter.requires_grad for parameter in editor.model.parameters())

    def test_updates_have_its_rank(self, tokenizer):
        editor, turns = trained(tokenizer, editor=se.LoRA, rank=2), []
        editor.on_turn = turns.append
        editor.edit(FACTS, progress=False)
        assert [update.rank for update in turns[0].passes[0].updates.values()] == [2, 2]

    def test_dropout_is_drawn_by_what_is_edited(self, tokenizer):
        state = torch.random.get_rng_state()
        found = [trained(tokenizer, editor=se.LoRA, dropout=dropout) for dropout in (0.5, 0.5, 0.0)]
        losses = [editor.edit(FACTS, progress=False).turns[0].losses for editor in found]
        assert losses[0] == losses[1] != losses[2]
        assert torch.equal(torch.random.get_rng_state(), state)


class TestCumulative:
    @pytest.mark.parametrize("editor", [se.FineTune, se.LoRA])
    def test_the_last_turn_is_that_of_all_requests_from_the_unedited_weights_on(self, editor, tokenizer):
        how = {"shuffle": False, "step_size": 1e-2, "cumulative": True, "micro_batch": 50}
        parts = trained(tokenizer, tiny_model("gpt2", torch.float64), editor, edit_modules=["*.1.mlp.c_proj"], **how)
        parts.edit(FACTS[:6], progress=False)
        parts.edit(FACTS[6:], progress=False)
        original = parts.original_weights()["transformer.h.1.mlp.c_proj"]
        # Turn, then what came before it; the adapter begins as that of the last turn does.
        model = tiny_model("gpt2", torch.float64)
        assert torch.equal(model.get_submodule("transformer.h.1.mlp.c_proj").weight, original)
        if editor is se.FineTune:
            whole = trained(tokenizer, model, editor, edit_modules=["*.1.mlp.c_proj"], **how)
            whole.edit(FACTS[6:] + FACTS[:6], progress=False)
            change = [one.weight_changes()["transformer.h.1.mlp.c_proj"] for one in (parts, whole)]
            assert torch.allclose(*change, rtol=0, atol=1e-9)
        assert len(parts.solver.past_requests) == len(FACTS)

    def test_replays_are_among_the_statements_of_a_turn(self, tokenizer):
        plain, again = (trained(tokenizer, replays=count) for count in (0, 32))
        for one in (plain, again):
            one.edit(FACTS[:6], progress=False)
        assert_same_bits(plain.state_dict()["weights"], again.state_dict()["weights"])
        losses = [one.edit(FACTS[6:], progress=False).turns[0].losses for one in (plain, again)]
        assert losses[0] != losses[1]


class TestAsAnyEditor:
    @pytest.mark.parametrize("editor", [se.FineTune, se.LoRA])
    def test_half_precision_is_trained_in_float32(self, editor, tokenizer):
        one = trained(tokenizer, tiny_model("llama", torch.bfloat16), editor, step_size=1e-6)
        one.edit(FACTS, progress=False)
        changes = one.weight_changes()
        assert all(change.dtype == torch.float32 and change.any() for change in changes.values())

    @pytest.mark.parametrize("editor", [se.FineTune, se.LoRA])
    @pytest.mark.parametrize("cumulative", [False, True])
    def test_goes_on_from_a_file_as_if_there_had_been_no_break(self, cumulative, editor, tokenizer, tmp_path):
        one, other = (trained(tokenizer, editor=editor, cumulative=cumulative, turn_size=4) for _ in range(2))
        one.edit(FACTS[:8], progress=False)
        one.save(tmp_path / "saved")
        loaded = se.load_editor(other.model, tokenizer, tmp_path / "saved")
        loaded.guard = None
        for each in (one, loaded):
            each.edit(FACTS[8:], progress=False)
        assert_same_bits(state_of(one), state_of(loaded))

    def test_a_turn_is_all_or_nothing(self, tokenizer):
        editor = trained(tokenizer, turn_size=6)
        editor.edit(FACTS[:6], progress=False)
        before = state_of(editor)

        def refuse(_turn):
            raise OSError("no room")

        editor.on_turn = refuse
        with pytest.raises(OSError, match="no room"):
            editor.edit(FACTS[6:], progress=False)
        assert_same_bits(state_of(editor), before)

    def test_a_broken_model_is_refused(self, tokenizer):
        editor = trained(tokenizer)
        with torch.no_grad():
            editor.model.get_submodule(MODULES[0]).weight[0, 0] = torch.nan
        editor.trunk = None
        with pytest.raises(ModelBroken, match="request 0: the loss is NaN or infinite; the turn was not applied"):
            editor.edit(FACTS, progress=False)

    @pytest.mark.parametrize("editor", [se.FineTune, se.LoRA])
    def test_a_guard_lets_a_share_of_the_change_through(self, editor, tokenizer):
        free, held, kept = (trained(tokenizer, editor=editor, step_size=5e-3) for _ in range(3))
        free.guard = se.LocalityGuard(free, limit=1e9, progress=False)
        drift = free.edit(FACTS, progress=False).drift
        held.guard = se.LocalityGuard(held, limit=drift / 2, progress=False)
        report = held.edit(FACTS, progress=False)
        share = held.guard.step_factor**report.back_offs
        assert report.back_offs > 0 and report.drift <= drift / 2
        for name in LLAMA:
            assert torch.allclose(held.weight_changes()[name], share * free.weight_changes()[name], atol=1e-6)
        kept.guard = se.LocalityGuard(kept, limit=1e-12, progress=False)
        with pytest.raises(se.DriftLimitReached):
            kept.edit(FACTS, progress=False)
        assert not kept.weight_changes()[LLAMA[0]].any()

    def test_a_patch_holds_what_was_added(self, tokenizer):
        editor = trained(tokenizer, editor=se.LoRA, rank=2)
        recorder = se.PatchRecorder(editor)
        editor.edit(FACTS, progress=False)
        patch = recorder.patch("facts")
        fresh = tiny_model("llama")
        weights = {name: fresh.get_submodule(name).weight.detach() for name in patch.modules}
        patch.add_to(weights)
        for name in LLAMA:
            assert torch.allclose(weights[name], editor.model.get_submodule(name).weight, atol=1e-6)


class TestConfigs:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"ridge": 3.0}, "ridge has no meaning for the editor 'fine-tune', which trains; leave it out"),
            ({"max_passes": 2}, "max_passes has no meaning"),
            ({"step_size": "auto"}, "step_size must be a finite number"),
            ({"epochs": 0}, "epochs"),
            ({"objective": "first"}, "objective must be one of 'target', 'prompt_last'"),
            ({"clamp": -1.0}, "clamp must be greater than 0"),
            ({"cumulative": True, "replays": 3}, "replays have no meaning with cumulative"),
        ],
    )
    def test_bad_values_are_refused(self, changes, words):
        with pytest.raises(ValueError, match=words):
            se.FineTuneConfig(**changes)

    def test_bad_values_of_lora_are_refused(self):
        for changes, words in (
            ({"rank": 0}, "rank"),
            ({"merge": 1.5}, "merge must be in"),
            ({"dropout": 1}, "dropout"),
        ):
            with pytest.raises(ValueError, match=words):
                se.LoRAConfig(**changes)

    def test_published_presets_name_their_modules(self):
        locft = se.FineTuneConfig.published("llama-3-8b")
        assert (locft.edit_modules, locft.step_size, locft.micro_batch) == (
            ["model.layers.22.mlp.down_proj"],
            5e-4,
            100,
        )
        assert locft.end_of_answer and locft.cumulative and locft.epochs == 25
        clamped = se.FineTuneConfig.published("gpt-j-6b", "ft-l")
        assert (clamped.clamp, clamped.objective) == (5e-5, "prompt_last")
        lora = se.LoRAConfig.published("llama-3-8b", turn_size=10)
        assert (lora.rank, lora.alpha, lora.merge, lora.turn_size) == (4, 8.0, 0.25, 10)
        with pytest.raises(ValueError, match="locft was not published for the model family 'llama-3-8', did you mean"):
            se.FineTuneConfig.published("llama-3-8")
        with pytest.raises(ValueError, match="unknown method 'loc', did you mean 'locft'"):
            se.FineTuneConfig.published(method="loc")

    @pytest.mark.parametrize("name", ["fine-tune", "ft", "ft-l", "ft-m", "locft", "lora", "lora-published"])
    def test_names_round_trip(self, name):
        config = se.EDITORS[name].config
        assert type(config).from_json(config.to_json()) == config
        assert not se.EDITORS[name].warm_up

    def test_rows_belong_to_requests_where_an_editor_solves(self, tokenizer):
        assert make(tokenizer).owns_rows and not trained(tokenizer).owns_rows
        assert {field.name for field in dataclasses.fields(se.FineTuneConfig)} > {"clamp", "cumulative"}

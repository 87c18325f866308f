"""Models that accelerate has offloaded: everything is, bit for bit, what it is for the same model in memory."""

from __future__ import annotations

import gc

import pytest
import torch
from accelerate import dispatch_model
from transformers import AutoModelForCausalLM

import stableedit_cpp as se
from stableedit_cpp import core
from stableedit_cpp.editors import EDITORS, make_editor
from stableedit_cpp.editors.guard import LocalityGuard
from stableedit_cpp.evaluation.generation import generate_continuations
from stableedit_cpp.export import (
    apply_delta,
    change_between,
    change_from_patch,
    change_of,
    export_delta,
    export_model,
    export_patch,
)
from stableedit_cpp.files import offloaded as rest
from stableedit_cpp.files.digest import model_digest
from stableedit_cpp.lifelong import LifelongSession
from stableedit_cpp.model.capture import capture
from stableedit_cpp.model.modules import find_modules
from support.captures import MICRO_BATCH, sequences_of
from support.editors import assert_same_bits
from support.offloaded import WAYS, from_checkpoint, on_disk
from support.tiny import FACTS, pattern_of, tiny_model

MODULES = "model.layers.[12].mlp.down_proj"
LAST = "model.layers.2.mlp.down_proj"


@pytest.fixture(params=WAYS)
def way(request, tmp_path):
    return lambda model: WAYS[request.param](model, tmp_path)


def closed_loop(**changes) -> se.StableEditConfig:
    how = {"edit_modules": MODULES, "step_size": 1e-2, "turn_size": 5, "max_passes": 3, "past_key_weight": 0.05}
    return se.StableEditConfig.one_pass(**(how | changes))


def edited(model, tokenizer, config=None, facts=FACTS, editor=se.StableEdit):
    made = editor(model, tokenizer, config or closed_loop(), guard=None)
    made.edit(facts, progress=False)
    return made


def weights_of(editor) -> dict[str, torch.Tensor]:
    """Where they rest, not what the editor holds."""
    return {module.name: module.weight.detach().clone() for module in editor.modules}


class TestSameBits:
    def test_closed_loop_guard_scores_and_answers(self, way, tokenizer):
        seen = []
        for model in (tiny_model("llama"), way(tiny_model("llama"))):
            editor = se.StableEdit(model, tokenizer, closed_loop())
            editor.guard = LocalityGuard(editor, ["Sugar is", "A longer prompt about nothing"], limit=1e6)
            report = editor.edit(FACTS, progress=False)
            assert editor.trunk.objection is None and len(editor.trunk) > 0
            after = weights_of(editor)
            editor.shrink(0.5)
            prompts = [fact["prompt"] for fact in FACTS]
            answers = generate_continuations(model, tokenizer, prompts, [4] * len(prompts))
            with editor.unedited():
                original = weights_of(editor)
            seen.append(
                {
                    "weights": after,
                    "half": weights_of(editor),
                    "unedited": original,
                    "logits": {"": model(torch.arange(3, 20).unsqueeze(0)).logits.detach()},
                    "rest": [[t.drift for t in report.turns], [a.text for a in answers], str(report.failed)],
                    "scores": se.evaluate(model, tokenizer, FACTS, trunk=editor.make_trunk_cache(), progress=False),
                }
            )
        plain, offloaded = seen
        for name, expected in plain.items():
            if isinstance(expected, dict):
                assert_same_bits(offloaded[name], expected)
            else:
                assert offloaded[name] == expected, name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_conv1d_with_a_bias(self, way, tokenizer, dtype):
        config = closed_loop(edit_modules="transformer.h.[12].mlp.c_proj")
        expected = weights_of(edited(tiny_model("gpt2", dtype), tokenizer, config))
        found = weights_of(edited(way(tiny_model("gpt2", dtype)), tokenizer, config))
        assert all(weight.dtype == dtype for weight in found.values())
        assert_same_bits(found, expected)

    @pytest.mark.parametrize("name", ["fine-tune", "lora", "rledit"])
    def test_other_editors(self, tokenizer, tmp_path, name):
        config = type(EDITORS[name].config)(edit_modules=pattern_of("llama"), turn_size=5)
        seen = []
        for model in (tiny_model("llama"), on_disk(tiny_model("llama"), tmp_path)):
            editor = make_editor(model, tokenizer, config)
            editor.guard = None
            editor.edit(FACTS[:6], progress=False)
            seen.append(weights_of(editor))
        # peft's own product, which is not oneDNN's where that is the faster one
        for module, weight in seen[0].items():
            torch.testing.assert_close(seen[1][module], weight, rtol=1e-5, atol=1e-6 if name == "lora" else 0)

    def test_session_with_revert_and_reopening(self, way, tokenizer, tmp_path):
        seen = []
        facts = [fact | {"id": f"f{number}"} for number, fact in enumerate(FACTS)]
        for number, model in enumerate((tiny_model("llama"), way(tiny_model("llama")))):
            directory = tmp_path / f"session-{number}"
            with LifelongSession.create(directory, model, tokenizer, closed_loop()) as session:
                session.editor.guard = None
                session.edit(facts[:10])
                session.revert(["f3"])
                session.rollback(to_turn=1)
                session.edit(facts[10:])
            seen.append(weights_of(session.editor))
        assert_same_bits(*reversed(seen))
        fresh = (tmp_path / "fresh").mkdir() or on_disk(tiny_model("llama"), tmp_path / "fresh")
        with LifelongSession.open(tmp_path / "session-1", fresh, tokenizer) as again:
            assert_same_bits(weights_of(again.editor), seen[0])

    def test_exports(self, way, tokenizer, tmp_path):
        editor = edited(way(tiny_model("llama")), tokenizer)
        expected = edited(tiny_model("llama"), tokenizer)
        digest = model_digest(expected.model)
        assert model_digest(editor.model) == digest
        export_model(editor.model, tokenizer, tmp_path / "model")
        assert model_digest(AutoModelForCausalLM.from_pretrained(tmp_path / "model")) == digest
        change = change_of(editor)
        export_delta(change, tmp_path / "delta")
        apply_delta(tiny := tiny_model("llama"), tmp_path / "delta")
        assert model_digest(tiny) == digest
        export_patch(change, tmp_path / "patch")
        export_patch(change_of(expected), tmp_path / "expected")
        patch, plain = (tmp_path / name / "patch.safetensors" for name in ("patch", "expected"))
        assert_same_bits(core.load_safetensors(patch)[0], core.load_safetensors(plain)[0])
        base = WAYS["host memory"](tiny_model("llama"), tmp_path)
        change_from_patch(base, core.load_patch(patch)).apply_to(base)
        change_from_patch(tiny := tiny_model("llama"), core.load_patch(plain)).apply_to(tiny)
        assert model_digest(base) == model_digest(tiny)

    def test_a_delta_is_applied_where_weights_rest(self, way, tokenizer, tmp_path):
        expected = edited(tiny_model("llama"), tokenizer)
        export_delta(change_of(expected), tmp_path / "delta")
        model = way(tiny_model("llama"))
        apply_delta(model, tmp_path / "delta")
        assert model_digest(model) == model_digest(expected.model)
        between = change_between(tiny_model("llama"), model)
        assert between.tensors.keys() == change_of(expected).tensors.keys()


class TestOnTheDisk:
    def test_the_checkpoint_stays_as_it_is(self, tokenizer, tmp_path):
        """Transformers leaves such weights in the checkpoint; edits go beside it, and away with the model."""
        (tmp_path / "edits").mkdir()
        model, _ = from_checkpoint(tmp_path, offload_folder=tmp_path / "edits")
        before = {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
        editor = edited(model, tokenizer)
        assert_same_bits(weights_of(editor), weights_of(edited(tiny_model("llama"), tokenizer)))
        assert before == {path: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
        names = sorted(path.name for path in (tmp_path / "edits").iterdir())
        assert len(names) == 2 and all(".mlp.down_proj.weight-" in name for name in names)  # the last of many versions
        del editor, model
        gc.collect()
        assert list((tmp_path / "edits").iterdir()) == []

    def test_a_folder_of_accelerates_stays_the_unedited_models(self, tokenizer, tmp_path):
        edited(on_disk(tiny_model("llama"), tmp_path), tokenizer)
        again = on_disk(tiny_model("llama", seed=1), tmp_path)  # takes what is in the folder
        assert model_digest(again) == model_digest(tiny_model("llama"))

    @pytest.mark.parametrize("fails", [1, 2, 3])
    def test_a_full_disk_leaves_nothing_of_the_turn(self, tokenizer, tmp_path, monkeypatch, fails):
        model = on_disk(tiny_model("llama"), tmp_path)
        editor = edited(model, tokenizer, facts=FACTS[:5])
        before, digest, written = weights_of(editor), model_digest(model), []
        masters = {name: weight.master.clone() for name, weight in editor.weights.items()}

        def save(*arguments):
            written.append(1)
            if len(written) >= fails:  # and has no room for what is to be put back, either
                raise OSError(28, "No space left on device")
            real(*arguments)

        real = rest.save_file
        monkeypatch.setattr(rest, "save_file", save)
        with pytest.raises(OSError, match="No space left"):
            editor.edit(FACTS[5:10], progress=False)
        assert_same_bits(weights_of(editor), before)
        assert_same_bits({name: weight.master for name, weight in editor.weights.items()}, masters)
        assert model_digest(model) == digest
        monkeypatch.undo()
        editor.edit(FACTS[5:], progress=False)
        expected = edited(tiny_model("llama"), tokenizer, facts=FACTS[:5])
        expected.edit(FACTS[5:], progress=False)
        assert_same_bits(weights_of(editor), weights_of(expected))

    def test_a_call_that_was_interrupted_left_the_weight_where_it_ran(self, tokenizer, tmp_path):
        model = on_disk(tiny_model("llama"), tmp_path)
        module = model.get_submodule(LAST)
        module._hf_hook.pre_forward(module)  # and post_forward never comes
        assert not module.weight.is_meta
        editor = edited(model, tokenizer)
        assert_same_bits(weights_of(editor), weights_of(edited(tiny_model("llama"), tokenizer)))

    def test_a_change_past_the_editor_is_noticed(self, tokenizer, tmp_path):
        model = on_disk(tiny_model("llama"), tmp_path)
        editor = edited(model, tokenizer, facts=FACTS[:5])
        (module,) = find_modules(model, LAST)
        module.write(torch.zeros(module.weight.shape))
        editor.edit(FACTS[5:8], progress=False)
        assert editor.weights.revision == 3
        assert editor.weights[LAST].master.abs().max() < 0.5


class TestMemory:
    def test_the_graph_holds_no_offloaded_weight(self, tokenizer, tmp_path):
        """What autograd keeps for the backward pass; a weight is fetched anew there."""
        kept = []
        for model in (tiny_model("llama"), on_disk(tiny_model("llama"), tmp_path)):
            sizes: list[tuple[int, ...]] = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, sizes=sizes: sizes.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
            ):
                found = find_modules(model, "model.layers.1.mlp.down_proj")
                capture(model, found, sequences_of(tokenizer), micro_batch=MICRO_BATCH, max_tokens=10_000)
            kept.append({shape for shape in sizes if shape in ((24, 16), (16, 24), (300, 16))})
        assert kept == [{(24, 16), (16, 24), (300, 16)}, set()]


class TestRefused:
    @pytest.mark.parametrize("where", WAYS)
    def test_tied_weights(self, where, tmp_path):
        config = tiny_model("llama").config
        config.tie_word_embeddings = True
        model = WAYS[where](AutoModelForCausalLM.from_config(config).eval(), tmp_path)
        with pytest.raises(ValueError, match=r"lm_head shares its weight with model\.embed_tokens\.weight"):
            find_modules(model, "lm_head")

    def test_a_head_of_its_own_is_no_tied_one(self, tmp_path):
        for way in WAYS.values():
            (module,) = find_modules(way(tiny_model("llama"), tmp_path), "lm_head")
            assert module.offloaded is not None

    def test_weights_that_are_nowhere(self):
        with pytest.raises(ValueError, match=r"is not in memory.*so it cannot be changed; load the model with"):
            find_modules(tiny_model("llama").to("meta"), MODULES)

    def test_an_adapter_has_nothing_to_be_merged_into(self, tokenizer, tmp_path, monkeypatch):
        from stableedit_cpp.export import export_lora
        from stableedit_cpp.export.loading import load_export

        export_lora(change_of(edited(tiny_model("llama"), tokenizer)), tmp_path / "adapter", rank=4)
        base = on_disk(tiny_model("llama"), tmp_path)
        with pytest.raises(ValueError, match="a LoRA adapter, which is merged into weights in memory"):
            load_export(tmp_path / "adapter", lambda _name, _dtype: (base, tokenizer), base="tiny")


def far(one, other) -> float:
    """How far apart two editors are, relative to what they did."""
    changes = [torch.cat([c.cpu().flatten() for c in e.weight_changes().values()]) for e in (one, other)]
    return float((changes[0] - changes[1]).norm() / changes[1].norm())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
class TestOnGPUs:
    """The same with modules that run elsewhere than their weights rest, and on several devices."""

    @pytest.mark.parametrize("where", ["cpu", "disk"])
    def test_runs_on_the_gpu_and_rests_elsewhere(self, tokenizer, tmp_path, where):
        names = ["embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb"]
        places = {f"model.{name}": where if name == "layers.2" else 0 for name in names} | {"lm_head": 0}
        model = dispatch_model(tiny_model("llama"), places, offload_dir=tmp_path, force_hooks=True)
        self.check(model, tokenizer, tmp_path)
        assert [module.home.type for module in find_modules(model, MODULES)] == ["cuda", "cpu"]

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
    @pytest.mark.parametrize("split", ["between layers", "within a layer"])
    def test_two_devices(self, tokenizer, tmp_path, split):
        """Edited modules on both, with statistics in common; and a module whose input comes from the other device."""
        model = tiny_model("llama")
        names = [name for name, part in model.named_modules() if not list(part.children())]
        second = ("layers.2.", "norm", "lm_head") if split == "between layers" else ("down_proj", "lm_head")
        places = {name: int(any(part in name for part in second)) for name in names}
        self.check(dispatch_model(model, places, force_hooks=True), tokenizer, tmp_path)

    @staticmethod
    def check(model, tokenizer, directory):
        facts = [fact | {"id": f"f{number}"} for number, fact in enumerate(FACTS)]
        with LifelongSession.create(directory / "session", model, tokenizer, closed_loop()) as session:
            session.editor.guard = LocalityGuard(session.editor, ["Sugar is", "One, two,"], limit=1e6)
            session.edit(facts)
            expected = se.StableEdit(tiny_model("llama").to("cuda"), tokenizer, closed_loop())
            expected.guard = LocalityGuard(expected, ["Sugar is", "One, two,"], limit=1e6)
            expected.edit(FACTS, progress=False)
            assert far(session.editor, expected) < 2e-2
            session.revert(["f3"])
            session.rollback(to_turn=2)
            scores = se.evaluate(model, tokenizer, FACTS, progress=False)
            assert scores == se.evaluate(model, tokenizer, FACTS, trunk=session.editor.make_trunk_cache())
        for name in ("fine-tune", "rledit"):
            config = type(EDITORS[name].config)(edit_modules=MODULES, turn_size=5)
            make_editor(model, tokenizer, config).edit(FACTS[:5], progress=False)

"""Edits of weights that are split over processes (``tp_plan="auto"``), beside those of one process."""

from __future__ import annotations

import os
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers.distributed import DistributedConfig

import stableedit_cpp as se
from stableedit_cpp.export.patch_recorder import PatchRecorder
from stableedit_cpp.lifelong import LifelongSession
from stableedit_cpp.model.modules import find_modules
from support.ranks import together
from support.tiny import FACTS, roomy_model, tiny_tokenizer

MODULES = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj", "model.layers.2.self_attn.o_proj"]
CONFIGS = {
    "one pass": se.StableEditConfig.one_pass(edit_modules=MODULES, step_size=1e-2, turn_size=5),
    "ultraedit": se.UltraEditConfig(edit_modules=MODULES, step_size=1e-2, turn_size=5),
    # Past keys, the automatic step, anchors, replays, the trunk cache and the guard.
    "default": se.StableEditConfig(edit_modules=MODULES, turn_size=5, max_passes=2, anchors=4, replays=4),
}
# Over the largest entry of what was added.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-9}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model whose keys, of 511 dimensions, no two processes can share evenly."""
    directory = tmp_path_factory.mktemp("saved")
    config = roomy_model("llama").config
    config.intermediate_size = 511
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def split_model(directory: Path, rank: int, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """As torchrun and transformers have it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(torch.distributed.get_world_size()))
    plan = DistributedConfig(tp_plan="auto")
    return se.load_model(directory, dtype=dtype, distributed_config=plan)[0]


def edited(name: str, model: torch.nn.Module) -> se.Editor:
    kind = se.UltraEdit if name == "ultraedit" else se.StableEdit
    editor = kind(model, tiny_tokenizer(), CONFIGS[name], guard="default" if name == "default" else None)
    editor.report = editor.edit(FACTS[:10], outcomes=True, progress=False)
    return editor


def facts_of(editor: se.Editor) -> dict[str, object]:
    turns = editor.report.turns
    return {
        "weights": {module.name: module.weight.detach().clone() for module in editor.modules},
        "masters": {name: weight.master.clone() for name, weight in editor.weights.items()},
        "columns": {
            module.name: module.columns and (module.columns.begin, module.columns.end) for module in editor.modules
        },
        "norms": [turn.update_norms for turn in turns],
        "passes": [turn.passes for turn in turns],
        "drift": [turn.drift for turn in turns],
    }


@cache
def alone(directory: Path, name: str, dtype: torch.dtype) -> dict[str, object]:
    return facts_of(edited(name, se.load_model(directory, dtype=dtype)[0]))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("one pass", torch.float32),
        ("one pass", torch.float64),
        pytest.param("default", torch.float64, marks=pytest.mark.slow),
        pytest.param("ultraedit", torch.float64, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_weights_are_those_of_one_process(name, dtype, saved, tmp_path):
    def work(rank: int) -> dict[str, object]:
        return facts_of(edited(name, split_model(saved, rank, dtype)))

    expected, found = alone(saved, name, dtype), together(2, work, tmp_path)
    original = se.load_model(saved, dtype=dtype)[0]
    for part in found:
        assert not isinstance(part, BaseException), part
        assert part["passes"] == expected["passes"]
    for module in MODULES:
        cuts = [part["columns"][module] for part in found]
        k = original.get_submodule(module).weight.shape[1]
        assert (cuts[0][0], cuts[0][1], cuts[1][1]) == (0, cuts[1][0], k) and cuts[0][1] == -(-k // 2)
        joined = torch.cat([part["weights"][module] for part in found], 1)
        change = expected["weights"][module] - original.get_submodule(module).weight.detach()
        assert float(change.abs().max()) > 1e-3
        off = (joined - expected["weights"][module]).abs().max()
        assert float(off) <= CLOSE[dtype] * max(1.0, float(change.abs().max()))
        for norms, theirs in zip(found[0]["norms"], expected["norms"], strict=True):
            assert norms[module] == pytest.approx(theirs[module], rel=1e-4)
    if name == "default":
        assert found[0]["drift"] == pytest.approx(expected["drift"], rel=1e-4)


def test_half_precision_has_masters_and_three_may_share(saved, tmp_path):
    """Three processes share 511 keys by 171, 171 and 169, but not two heads of attention."""
    name = "model.layers.2.mlp.down_proj"

    def work(rank: int) -> dict[str, object]:
        plan = {f"model.layers.*.self_attn.{one}_proj": "replicate" for one in "qkvo"}
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="3")
        how = DistributedConfig(tp_plan=plan)
        model = se.load_model(saved, dtype=torch.bfloat16, distributed_config=how)[0]
        return facts_of(edited("one pass", model))

    found = together(3, work, tmp_path)
    assert [part["columns"][name] for part in found] == [(0, 171), (171, 342), (342, 511)]
    for part in found:
        assert part["columns"]["model.layers.2.self_attn.o_proj"] is None  # whole everywhere
        assert part["masters"][name].dtype == torch.float32
        assert torch.equal(part["masters"][name].bfloat16(), part["weights"][name])


def refuse(_turn: object) -> None:
    raise ValueError("refused")


@pytest.mark.slow
def test_what_needs_no_whole_weight(saved, tmp_path):
    """The unedited model for a while, a way back, scores, shrinking, and saving the whole by transformers."""
    plain = se.load_model(saved, dtype=torch.float64)[0]
    one = edited("one pass", plain)
    one.shrink(0.5)
    scores = se.evaluate(plain, tiny_tokenizer(), FACTS, progress=False).per_request

    def work(rank: int) -> dict[str, object]:
        model = split_model(saved, rank)
        before = [module.weight.clone() for module in find_modules(model, MODULES)]
        editor = edited("one pass", model)
        after = [module.weight.clone() for module in editor.modules]
        with editor.unedited():
            assert all(torch.equal(m.weight, w) for m, w in zip(editor.modules, before, strict=True))
        assert all(torch.equal(m.weight, w) for m, w in zip(editor.modules, after, strict=True))
        checkpoint = editor.checkpoint()
        editor.edit(FACTS[10:], progress=False)
        checkpoint.restore()
        assert all(torch.equal(m.weight, w) for m, w in zip(editor.modules, after, strict=True))
        editor.on_turn = refuse
        with pytest.raises(ValueError, match="refused"):
            editor.edit(FACTS[10:], progress=False)
        assert all(torch.equal(m.weight, w) for m, w in zip(editor.modules, after, strict=True))
        editor.on_turn = None
        editor.shrink(0.5)
        model.save_pretrained(tmp_path / "whole", is_main_process=rank == 0)
        return se.evaluate(model, tiny_tokenizer(), FACTS, progress=False).per_request

    (tmp_path / "ranks").mkdir()
    for found in together(2, work, tmp_path / "ranks"):
        assert found == scores
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    for module in MODULES:
        torch.testing.assert_close(
            whole.get_submodule(module).weight, plain.get_submodule(module).weight, rtol=0, atol=1e-9
        )


def test_a_process_that_goes_is_said_and_no_turn_is_half_done(saved, tmp_path):
    """Between the first turn and the second, which the other then cannot run."""

    def work(rank: int) -> dict[str, object]:
        editor = se.StableEdit(split_model(saved, rank), tiny_tokenizer(), CONFIGS["one pass"], guard=None)
        editor.edit(FACTS[:5], progress=False)
        before = [module.weight.clone() for module in editor.modules]
        if rank == 1:
            os._exit(1)
        with pytest.raises(se.RankLost, match=r"a process .* has gone or did not answer in time") as lost:
            editor.edit(FACTS[5:], progress=False)
        assert lost.value.report.turns == []
        assert all(torch.equal(m.weight, w) for m, w in zip(editor.modules, before, strict=True))
        return {"left": True}

    left, gone = together(2, work, tmp_path)
    assert left == {"left": True} and gone is None


def refused(directory: Path, scratch: Path, rank: int) -> dict[str, str]:
    """What is said of what cannot be done."""
    model, tokenizer = split_model(directory, rank), tiny_tokenizer()
    said: dict[str, str] = {}

    def note(what: str, work) -> None:
        try:
            work()
        except ValueError as error:
            said[what] = str(error)

    edit = partial(se.StableEditConfig.one_pass, step_size=1e-2)
    rows = edit(edit_modules=["model.layers.1.mlp.up_proj"])
    note("rows", lambda: se.StableEdit(model, tokenizer, rows))
    note("other editors", lambda: se.FineTune(model, tokenizer, se.FineTuneConfig(edit_modules=MODULES)))
    editor = se.StableEdit(model, tokenizer, edit(edit_modules=MODULES), guard=None)
    note("state", editor.state_dict)
    note("save", lambda: editor.save(scratch / f"{rank}.safetensors"))
    note("changes", editor.weight_changes)
    note("patch", lambda: PatchRecorder(editor))
    note("session", lambda: LifelongSession.create(scratch / f"session{rank}", model, tokenizer, editor.config))
    shared = se.StableEdit(model, tokenizer, edit(edit_modules=MODULES), guard=None, distributed="auto")
    note("data parallel", lambda: shared.edit(FACTS, progress=False))
    mesh, plane = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    for what, where, layout, width in (
        ("whole everywhere", mesh, [Replicate()], 8),
        ("two dimensions", plane, [Shard(1), Replicate()], 8),
        ("too narrow", mesh, [Shard(1)], 1),
    ):
        linear = torch.nn.Linear(width, 4, bias=False)
        linear.weight = torch.nn.Parameter(distribute_tensor(linear.weight.detach(), where, layout))
        note(what, lambda linear=linear: find_modules(torch.nn.ModuleDict({"m": linear}), ["m"]))
    assert not list(scratch.glob(f"*{rank}*"))
    return said


def test_what_cannot_be_done_is_a_sentence(saved, tmp_path):
    for part in ("scratch", "ranks"):
        (tmp_path / part).mkdir()
    first, second = together(2, partial(refused, saved, tmp_path / "scratch"), tmp_path / "ranks")
    assert not isinstance(first, BaseException), first
    assert first == second
    whole = "that of model.layers.1.mlp.down_proj is split over 2 processes; save the model with model.save_pretrained"
    for what in ("other editors", "state", "save", "changes", "patch", "session", "data parallel"):
        assert whole in first[what], what
    assert "FineTune, unlike StableEdit and UltraEdit, needs whole weights" in first["other editors"]
    assert "up_proj has a weight that is split by rows, as FSDP and column-parallel maps are," in first["rows"]
    assert "such as down_proj and o_proj" in first["rows"]
    assert "has the layout Replicate() over 2 processes; only row-parallel" in first["whole everywhere"]
    assert "split over 2 dimensions of processes" in first["two dimensions"]
    assert "has 1 columns, of which some of 2 processes have none" in first["too narrow"]

"""State, patches and their container: both ways between C++ and Python, and whatever can be wrong with a file."""

from __future__ import annotations

import copy
import json
import os
import stat
import zlib

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stableedit_cpp as se
from stableedit_cpp import core
from support.sessions import files_no_larger_than
from support.tiny import FACTS, pattern_of, tiny_model

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bytes of a dtype."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(high, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


def header_of(data: bytes) -> dict:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def build(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# --- the container --------------------------------------------------------------------------------


def test_python_reads_what_we_write(tmp_path):
    tensors = {f"{dtype}": tensor_of(dtype, (3, 2), seed) for seed, dtype in enumerate(DTYPES)}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), 'Ünïcode "\\\n': torch.ones(1)}
    metadata = {"format": "pt", "text": 'two\nlines "quoted" µ'}
    core.save_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    assert all(same(read[name], tensors[name]) for name in tensors)
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        stored = file.metadata()
    assert stored.pop("stableedit.checksum").startswith("crc32:")
    assert stored == metadata


def test_we_read_what_python_writes(tmp_path):
    tensors = {f"{dtype}": tensor_of(dtype, (2, 5), seed) for seed, dtype in enumerate(DTYPES)}
    tensors |= {"empty": torch.empty(0, 4), "scalar": torch.tensor(2.5)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"key": "value"})
    for read, metadata in (
        core.load_safetensors(tmp_path / "a.safetensors"),
        core.parse_safetensors((tmp_path / "a.safetensors").read_bytes()),
    ):
        assert metadata == {"key": "value"}
        assert read.keys() == tensors.keys()
        assert all(same(read[name], tensors[name]) for name in tensors)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3).map(tuple)),
        max_size=6,
    )
)
def test_the_same_bytes_as_the_reference_implementation(tmp_path_factory, spec):
    tensors = {name: tensor_of(dtype, shape) for name, (dtype, shape) in spec.items()}
    path = tmp_path_factory.mktemp("bytes") / "a.safetensors"
    core.save_safetensors(path, tensors)
    ours = path.read_bytes()
    assert ours == safetensors.torch.save(tensors, header_of(ours)["__metadata__"])


def test_layouts_and_views_are_written_as_they_look(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"transposed": base.t(), "strided": base[::2, 1::2], "grad": torch.nn.Parameter(base), "same": base}
    core.save_safetensors(tmp_path / "a", tensors)
    read, _ = core.load_safetensors(tmp_path / "a")
    assert all(torch.equal(read[name], tensors[name]) and read[name].is_contiguous() for name in tensors)


def test_checksum_is_zlibs_over_the_documented_sequence(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(7)}
    core.save_safetensors(tmp_path / "a", tensors, {"z": "1", "format": "x"})
    crc = zlib.crc32(b"format\0x\0z\x001\0")
    crc = zlib.crc32(b"a\0I64\0\0" + bits(tensors["a"]), crc)
    crc = zlib.crc32(b"b\0F32\x002,3,\0" + bits(tensors["b"]), crc)
    stored = header_of((tmp_path / "a").read_bytes())["__metadata__"]["stableedit.checksum"]
    assert stored == f"crc32:{crc:08x}"


def test_a_checksum_survives_another_writer_and_names_the_damaged_file(tmp_path):
    core.save_safetensors(tmp_path / "a", {"x": torch.arange(100.0)}, {"k": "v"})
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(safetensors.torch.load_file(tmp_path / "a"), tmp_path / "b", metadata)
    assert torch.equal(core.load_safetensors(tmp_path / "b")[0]["x"], torch.arange(100.0))
    damaged = bytearray((tmp_path / "b").read_bytes())
    damaged[-3] ^= 1
    (tmp_path / "b").write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{tmp_path}/b is damaged: its checksum is crc32:\w+, but it was written"):
        core.load_safetensors(tmp_path / "b")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD = {
    "nothing": (b"", "only 0 bytes"),
    "seven bytes": (b"\0" * 7, "only 7 bytes"),
    "cut off in the header": (build({"x": ENTRY}, bytes(8))[:40], "header"),
    "huge header": ((2**63).to_bytes(8, "little") + b"{}", "announces a header of 9223372036854775808"),
    "header above the limit": ((100_000_001).to_bytes(8, "little") + bytes(100_000_001), "at most 100000000"),
    "not JSON": (build(b"hello"), "not valid JSON"),
    "not UTF-8": (build(b'{"\xff": 1}'), "not valid JSON"),
    "zero byte": (build(b"{}\0 and more"), "not valid JSON"),
    "number overflow": (build(b'{"x": 1e999}'), "not valid JSON"),
    "no object": (build([]), "no object"),
    "deep": (build(b'{"x":' * 100_000 + b"1" + b"}" * 100_000), "nested"),
    "deep array": (build(b"[" * 100_000 + b"]" * 100_000), "nested"),
    "twice": (build(b'{"x": %s, "x": %s}' % ((json.dumps(ENTRY).encode(),) * 2), bytes(8)), "two members 'x'"),
    "twice inside": (build(b'{"x": {"dtype": "F32", "dtype": "F64"}}'), "two members 'dtype'"),
    "metadata of numbers": (build({"__metadata__": {"a": 1}}), "strings to strings"),
    "metadata no object": (build({"__metadata__": "a"}), "strings to strings"),
    "field missing": (build({"x": {"dtype": "F32", "shape": [2]}}, bytes(8)), "must have dtype, shape"),
    "field too many": (build({"x": ENTRY | {"more": 1}}, bytes(8)), "nothing else"),
    "unknown dtype": (build({"x": ENTRY | {"dtype": "F31"}}, bytes(8)), "dtype 'F31'"),
    "negative size": (build({"x": ENTRY | {"shape": [-2]}}, bytes(8)), "not a whole number"),
    "fraction": (build({"x": ENTRY | {"shape": [2.0]}}, bytes(8)), "not a whole number"),
    "offset beyond int64": (build({"x": ENTRY | {"data_offsets": [0, 2**64 - 1]}}, bytes(8)), "not a whole number"),
    "product overflows": (build({"x": ENTRY | {"shape": [2**62, 2**62]}}, bytes(8)), "larger than any memory"),
    "strides overflow": (build({"x": ENTRY | {"shape": [0, 2**62, 2**62]}}, bytes(8)), "larger than any memory"),
    "too many dimensions": (build({"x": ENTRY | {"shape": [1] * 65}}, bytes(8)), "65 dimensions"),
    "shape and offsets": (build({"x": ENTRY | {"shape": [3]}}, bytes(8)), "needs 12 bytes"),
    "backwards": (build({"x": ENTRY | {"data_offsets": [8, 0]}}, bytes(8)), "needs 8 bytes"),
    "overlap": (build({"x": ENTRY, "y": ENTRY}, bytes(8)), "must begin at 8"),
    "hole": (build({"x": ENTRY | {"data_offsets": [4, 12]}}, bytes(12)), "must begin at 0"),
    "too few bytes": (build({"x": ENTRY}, bytes(7)), "has 7 bytes of tensors, but its header describes 8"),
    "bytes too many": (build({"x": ENTRY}, bytes(9)), "has 9 bytes of tensors"),
    "bool of two": (build({"x": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\2"), "other than 0 and 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(tmp_path, name):
    data, message = BAD[name]
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(ValueError) as from_file:
        core.load_safetensors(tmp_path / "bad")
    with pytest.raises(ValueError) as from_memory:
        core.parse_safetensors(data, "request body")
    for error, source in ((from_file, str(tmp_path / "bad")), (from_memory, "request body")):
        text = str(error.value).split("\nException raised from")[0]
        assert text.startswith(source)
        assert message in text
        assert "\n" not in text


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutations_are_refused_or_harmless(data):
    whole = bytearray(safetensors.torch.save({"a": torch.arange(4.0), "b": torch.ones(2, 2)}, {"key": "value"}))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(whole) - 1))
        whole[position : position + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        tensors, _ = core.parse_safetensors(bytes(whole))
    except ValueError as error:
        assert str(error).startswith("the buffer")
    else:  # then the reference implementation must read the same
        expected = safetensors.torch.load(bytes(whole))
        assert tensors.keys() == expected.keys()
        assert all(same(tensors[name], expected[name]) for name in tensors)


# --- atomic writes --------------------------------------------------------------------------------


def test_errors_of_the_file_system_are_pythons_own(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        core.load_safetensors(tmp_path / "absent")
    assert error.value.filename == str(tmp_path / "absent")
    with pytest.raises(IsADirectoryError):
        core.load_safetensors(tmp_path)
    with pytest.raises(IsADirectoryError):
        core.save_safetensors(tmp_path, {})
    with pytest.raises(FileNotFoundError):
        core.save_safetensors(tmp_path / "absent" / "a", {})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="Invalid argument"):
        core.load_safetensors(tmp_path / "pipe")
    assert {entry.name for entry in tmp_path.iterdir()} == {"pipe"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.safetensors"
    core.save_safetensors(path, {"x": torch.ones(3)})
    before = path.read_bytes()
    for bad, message in (
        ({"x": torch.ones(2, dtype=torch.complex128)}, "cannot hold a tensor of dtype ComplexDouble"),
        ({"__metadata__": torch.ones(2)}, "cannot be named"),
        ({"x": torch.eye(2).to_sparse()}, "must be dense"),
    ):
        with pytest.raises(ValueError, match=message):
            core.save_safetensors(path, bad)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    # A limit on file size stands in for the disk: the write fails half-way, with EFBIG instead of ENOSPC. The signal
    # that comes with it would end a C++ program; Python ignores it.
    path = tmp_path / "a.safetensors"
    core.save_safetensors(path, {"x": torch.ones(3)})
    before = path.read_bytes()
    with files_no_larger_than(4096), pytest.raises(OSError) as caught:
        core.save_safetensors(path, {"x": torch.ones(100_000)})
    assert str(caught.value) == f"[Errno 27] File too large: '{path}'"
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_have_the_usual_permissions(tmp_path):
    mask = os.umask(0o027)
    try:
        core.save_safetensors(tmp_path / "a", {"x": torch.ones(3)})
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


# --- state ----------------------------------------------------------------------------------------

K, V, ROWS = 7, 5, 40


def turn(seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(V, V, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    keys = torch.randn(ROWS, K, generator=generator, dtype=torch.float64)
    return keys.to(dtype), (torch.randn(ROWS, V, generator=generator, dtype=torch.float64) @ mixing).to(dtype)


def editor(mode: str = "full", refresh: float = 0.3, dtype: torch.dtype = torch.float32, turns: int = 4, **options):
    normalizer = core.LifelongNormalizer(K, V, whitening=core.WhiteningOptions(mode=mode, refresh=refresh), **options)
    made = core.ModuleEditor(normalizer)
    for seed in range(turns):
        made.edit(*turn(seed, dtype))
    return made


SETTINGS = {
    "refresh 0": {"mode": "full", "refresh": 0.0},
    "refresh 0.3": {"mode": "full", "refresh": 0.3},
    "refresh 1, prior": {"mode": "full", "refresh": 1.0, "prior": core.NiwPrior(kappa=0.3, psi=1e-3, nu=2.0)},
    "float64": {"mode": "full", "refresh": 0.3, "dtype": torch.float64},
    "diagonal": {"mode": "diagonal", "unbiased_batches": True},
    "none": {"mode": "none"},
    "no turns": {"mode": "full", "turns": 0},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("through", ["memory", "our file", "python's file"])
def test_goes_on_bit_for_bit(tmp_path, options, through):
    original = editor(**options)
    state = original.normalizer.state_dict()
    if through == "our file":
        core.save_state(tmp_path / "state", {"normalizer/5 -> 7": state}, config='{"a": 1}')
        components, config = core.load_state(tmp_path / "state")
        assert config == '{"a": 1}'
        state = components["normalizer/5 -> 7"]
    elif through == "python's file":
        safetensors.torch.save_file(state, tmp_path / "state")
        state = safetensors.torch.load_file(tmp_path / "state")
    restored = core.ModuleEditor(core.LifelongNormalizer.from_state_dict(state))
    for seed in range(10, 20):
        keys, gradients = turn(seed, options.get("dtype", torch.float32))
        if seed == 15:  # a jump of the distribution, which drops the whitener
            gradients = gradients * 100
        a, b = original.edit(keys, gradients), restored.edit(keys, gradients)
        assert same(a.left, b.left)
        assert same(a.right, b.right)
    ours, theirs = original.normalizer.state_dict(), restored.normalizer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in ours)
    assert restored.normalizer.decompositions == original.normalizer.decompositions


def test_a_restored_copy_is_its_own():
    original = editor()
    state = {name: tensor.clone() for name, tensor in original.normalizer.state_dict().items()}
    restored = core.LifelongNormalizer.from_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    assert restored.count == original.normalizer.count
    assert torch.equal(restored.value_tracker.psi(), original.normalizer.value_tracker.psi())


@pytest.mark.parametrize("part", ["key_moments", "value_tracker", "whitener"])
def test_parts_have_states_of_their_own(part):
    original = getattr(editor().normalizer, part)
    restored = type(original).from_state_dict(original.state_dict())
    ours, theirs = original.state_dict(), restored.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in ours)


def test_every_field_is_needed_and_checked():
    state = editor(prior=core.NiwPrior(kappa=0.1)).normalizer.state_dict()
    for name, tensor in state.items():
        wrong = {
            "dtype": tensor.to(torch.float16) if tensor.is_floating_point() else tensor.to(torch.int32),
            "shape": tensor.unsqueeze(0),
        }
        if tensor.is_floating_point():
            wrong["value"] = torch.full_like(tensor, float("nan"))
        for bad in wrong.values():
            with pytest.raises(ValueError, match="state of a"):
                core.LifelongNormalizer.from_state_dict(state | {name: bad})
        # Without the first there is no whitener; version 1 has not the second, nor 0.2.0 the third.
        if name not in ("whitener_nu", "whitener.mean_square", "whitening.centred"):
            with pytest.raises(ValueError, match=r"lacks|do not fit"):
                core.LifelongNormalizer.from_state_dict({n: t for n, t in state.items() if n != name})
    with pytest.raises(ValueError, match="unknown field 'more'"):
        core.LifelongNormalizer.from_state_dict(state | {"more": torch.ones(1)})
    with pytest.raises(ValueError, match="from 0 to"):
        core.LifelongNormalizer.from_state_dict(state | {"keys.count": torch.tensor(-1)})


def test_state_files_say_what_they_are(tmp_path):
    path = tmp_path / "state.safetensors"
    core.save_state(path, {"tracker": editor().normalizer.value_tracker.state_dict()}, "{}")
    tensors, metadata = core.load_safetensors(path)
    assert metadata == {"format": "stableedit-state", "version": "2", "config": "{}"}
    assert set(tensors) == {f"tracker/{field}" for field in editor().normalizer.value_tracker.state_dict()}

    for changes, message in (
        ({"version": "3"}, "version 3, but this stableedit reads versions up to 2; use a newer stableedit"),
        ({"version": "one"}, "no valid format version"),
        ({"format": "stableedit-patch"}, "is not a stableedit-state file: its metadata has format 'stableedit-patch'"),
    ):
        core.save_safetensors(path, tensors, metadata | changes)
        with pytest.raises(ValueError, match=message) as error:
            core.load_state(path)
        assert str(error.value).startswith(str(path))
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="has no checksum"):
        core.load_state(path)
    core.save_safetensors(path, {"x": torch.ones(1)}, metadata)
    with pytest.raises(ValueError, match="tensor 'x', which belongs to nothing"):
        core.load_state(path)
    with pytest.raises(ValueError, match="must not contain a slash"):
        core.save_state(path, {"a": {"b/c": torch.ones(1)}})


@pytest.mark.parametrize("statistics", ["shared", "per_module"])
def test_an_editor_goes_on_from_its_file(tmp_path, tokenizer, statistics):
    config = se.StableEditConfig.one_pass(
        edit_modules=pattern_of("llama"), turn_size=4, refresh=0.3, statistics=statistics, warm_up_whitening="diagonal"
    )
    editor = se.StableEdit(tiny_model("llama"), tokenizer, config)
    editor.edit(FACTS[:8], progress=False)
    states = {f"normalizer/{group}": normalizer.state_dict() for group, normalizer in editor.normalizers.items()}
    core.save_state(tmp_path / "state", states, config=config.to_json())
    model = copy.deepcopy(editor.model)
    editor.edit(FACTS[8:], progress=False)

    components, text = core.load_state(tmp_path / "state")
    resumed = se.StableEdit(model, tokenizer, se.StableEditConfig.from_json(text))
    assert set(components) == {f"normalizer/{group}" for group in resumed.normalizers}
    for group, normalizer in resumed.normalizers.items():
        normalizer.restore(core.LifelongNormalizer.from_state_dict(components[f"normalizer/{group}"]))
    resumed.edit(FACTS[8:], progress=False)
    for first, second in zip(editor.modules, resumed.modules, strict=True):
        assert torch.equal(first.weight, second.weight)


# --- patches --------------------------------------------------------------------------------------


def example_patch() -> core.Patch:
    torch.manual_seed(0)
    return core.Patch(
        {
            "layers.0": core.WeightChange(core.LowRankUpdate(torch.randn(V, 2), torch.randn(2, K))),
            "layers.1": core.WeightChange(core.LowRankUpdate(torch.randn(V, 2), torch.randn(2, K)), "conv1d"),
            "layers.2": core.WeightChange(torch.randn(V, K)),
            "layers.3": core.WeightChange(torch.randn(V, K), "conv1d"),
        },
        id="capital",
        created="2026-01-02T03:04:05+0000",
        base_model="tiny",
        base_digest="blake2b:00",
        config="{}",
        requests='{"count": 1}',
    )


def weights_for(patch: core.Patch, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes = {name: (V, K) if change.layout == "linear" else (K, V) for name, change in patch.modules.items()}
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def test_patch_round_trip(tmp_path):
    patch = example_patch()
    core.save_patch(tmp_path / "p", patch)
    for read in (core.load_patch(tmp_path / "p"), core.parse_patch((tmp_path / "p").read_bytes())):
        for field in ("id", "created", "base_model", "base_digest", "config", "requests"):
            assert getattr(read, field) == getattr(patch, field)
        assert read.modules.keys() == patch.modules.keys()
        for name, change in patch.modules.items():
            other = read.modules[name]
            assert (other.layout, other.is_low_rank) == (change.layout, change.is_low_rank)
            assert same(other.dense(), change.dense())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_patch_adds_its_matrices(dtype):
    patch = example_patch()
    weights = weights_for(patch, dtype)
    before = {name: weight.clone() for name, weight in weights.items()}
    patch.add_to(weights)
    for name, change in patch.modules.items():
        delta = change.dense() if change.layout == "linear" else change.dense().T
        compute = torch.promote_types(dtype, torch.float32)
        expected = before[name].to(compute) + delta.to(compute)
        tolerance = 4 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
        torch.testing.assert_close(weights[name].to(compute), expected, rtol=tolerance, atol=tolerance)
    patch.subtract_from(weights)
    for name in weights:
        torch.testing.assert_close(weights[name], before[name], rtol=0.02, atol=0.02)


def test_a_patch_that_does_not_fit_changes_nothing():
    patch = example_patch()
    weights = weights_for(patch)
    before = {name: weight.clone() for name, weight in weights.items()}
    with pytest.raises(ValueError, match=r"changes module 'layers.3', which is not among"):
        patch.add_to({name: weight for name, weight in weights.items() if name != "layers.3"})
    with pytest.raises(ValueError, match=r"module 'layers.3': weight must have shape \[7, 5\]"):
        patch.add_to(weights | {"layers.3": torch.ones(V, K)})
    assert all(torch.equal(weights[name], before[name]) for name in weights)


def test_patch_files_are_checked(tmp_path):
    path = tmp_path / "p"
    core.save_patch(path, example_patch())
    tensors, metadata = core.load_safetensors(path)
    for changed, fields, message in (
        ({"layers.0/left": torch.ones(V, 3)}, {}, r"left \[v, r\] and right \[r, k\]"),
        ({"layers.0/left": torch.ones(V, 2, dtype=torch.int64)}, {}, "must be a float32, float64"),
        ({"layers.0/left": torch.ones(V, 2).to(torch.float8_e5m2)}, {}, "must be a float32, float64"),
        ({"layers.2/delta": torch.full((V, K), float("inf"))}, {}, "NaN or infinite"),
        ({"layers.2/delta": torch.ones(V)}, {}, "must be a float32, float64"),
        ({"layers.2/left": torch.ones(V, 2)}, {}, "or 'delta' alone"),
        ({}, {"layers.0/layout": "diagonal"}, "layout 'linear' or 'conv1d' in the metadata, not 'diagonal'"),
        ({}, {"version": "7"}, "version 7"),
    ):
        core.save_safetensors(path, tensors | changed, metadata | fields)
        with pytest.raises(ValueError, match=message) as error:
            core.load_patch(path)
        assert str(error.value).startswith(str(path))


def test_python_reads_a_patch(tmp_path):
    patch = example_patch()
    core.save_patch(tmp_path / "p", patch)
    tensors = safetensors.torch.load_file(tmp_path / "p")
    torch.testing.assert_close(tensors["layers.0/left"] @ tensors["layers.0/right"], patch.modules["layers.0"].dense())
    assert torch.equal(tensors["layers.2/delta"], patch.modules["layers.2"].dense())

"""Digests: equal for what is the same model or file, different for the smallest change."""

from __future__ import annotations

import hashlib
import shutil
import subprocess

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from stableedit_cpp.files.digest import checksum, file_digest, fingerprint, model_digest, tensor_digest
from support.tiny import ARCHITECTURES, tiny_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_and_loaded(tmp_path, dtype):
    model = tiny_model("llama", dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert model_digest(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == model_digest(model)


def test_architectures_and_dtypes_differ():
    digests = [model_digest(tiny_model(architecture)) for architecture in ARCHITECTURES]
    digests += [model_digest(tiny_model("llama", dtype)) for dtype in DTYPES[1:]]
    digests += [model_digest(tiny_model("llama", seed=1))]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 64 and int(digest, 16) for digest in digests)


def test_same_in_any_mode_or_memory_layout():
    model = tiny_model("llama")
    expected = model_digest(model)
    assert model_digest(model.train().requires_grad_(False)) == expected
    down = model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach().t().contiguous().t())
    assert not down.weight.is_contiguous()
    assert model_digest(model) == expected


@pytest.mark.parametrize("flip", [0, 1, -1])
def test_any_changed_bit(flip):
    model = tiny_model("gpt2")
    expected = model_digest(model)
    for parameter in model.parameters():
        bits = parameter.detach().view(-1).view(torch.int32)
        bits[flip] ^= 1
        assert model_digest(model) != expected
        bits[flip] ^= 1
    assert model_digest(model) == expected


def test_exchanged_weights():
    model = tiny_model("llama")
    before = model_digest(model)
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    first.down_proj, second.down_proj = second.down_proj, first.down_proj
    assert model_digest(model) != before


def test_buffers_count():
    model = nn.BatchNorm1d(3)
    before = model_digest(model)
    model.running_mean[1] = 1e-30
    assert model_digest(model) != before


def test_tied_or_only_equal():
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    loose = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    loose.load_state_dict(tied.state_dict())
    assert model_digest(tied) == model_digest(loose)


def test_exclude():
    model = tiny_model("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    without, whole = model_digest(model, exclude=[name]), model_digest(model)
    assert without != whole
    with torch.no_grad():
        model.get_parameter(name).mul_(2)
    assert model_digest(model, exclude=[name]) == without
    assert model_digest(model) != whole
    with pytest.raises(ValueError, match=r"exclude: the model has no parameter or buffer 'model\.layers\.9'"):
        model_digest(model, exclude=["model.layers.9"])


def test_not_in_memory():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"bias is not in memory \(meta device\)"):
        model_digest(model)


def test_tensor_digest():
    tensor = torch.arange(6.0)
    digests = {tensor_digest(tensor.view(shape)) for shape in [(6,), (2, 3), (3, 2), (6, 1)]}
    assert len(digests) == 4
    assert tensor_digest(torch.tensor(0.0)) != tensor_digest(torch.tensor(-0.0))
    assert tensor_digest(torch.zeros(0, 3)) != tensor_digest(torch.zeros(3, 0))
    assert tensor_digest(tensor.view(2, 3).t()) == tensor_digest(tensor.view(2, 3).t().contiguous())


def by_hand(tensor: torch.Tensor, block: int, rest: int) -> bytes:
    """Sums of columns in blocks of 64 rows of 509 words; with ``block`` 1 those of fewer rows, or of none, as one more;
    then what is left in words of ``rest`` bytes, and what is no such word byte by byte."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    words, columns = [], [0] * 509
    whole = len(data) // (8 * block * 509) * block * 509
    for index in range(whole):
        columns[index % 509] += int.from_bytes(data[8 * index : 8 * index + 8], "little", signed=True)
        if (index + 1) % (64 * 509) == 0:
            words += columns
            columns = [0] * 509
    words += columns if block == 1 else []
    left = data[8 * whole :]
    even = len(left) // rest * rest
    words += [int.from_bytes(left[begin : begin + rest], "little") for begin in range(0, even, rest)] + [*left[even:]]
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode(), digest_size=16)
    digest.update(b"".join((word % 2**64).to_bytes(8, "little") for word in words))
    return digest.digest()


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (300, 401), (2, 509 * 64), (513, 509)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_fingerprints_are_what_they_say(shape, dtype):
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e6).to(dtype)
    assert fingerprint(tensor) == by_hand(tensor, 64, 1)
    assert checksum(tensor) == by_hand(tensor, 1, 8)


@pytest.mark.parametrize("fingerprint", [fingerprint, checksum])
def test_fingerprints_show_what_differs(fingerprint):
    """Single bits, rounding of a few numbers up and down, rows and columns exchanged; not how it lies in memory."""
    source = torch.Generator().manual_seed(0)
    tensor = torch.randn(400, 1024, generator=source)
    known = {fingerprint(tensor), fingerprint(tensor.view(1024, 400)), fingerprint(tensor.double())}
    for place in (0, 1, 70_000, 260_000, tensor.numel() - 1):
        changed = tensor.clone()
        changed.view(-1).view(torch.int32)[place] ^= 1
        known.add(fingerprint(changed))
    for _ in range(50):
        changed = tensor.clone()
        up, down = torch.randperm(tensor.numel(), generator=source)[:2]
        changed.view(-1).view(torch.int32)[up] += 1
        changed.view(-1).view(torch.int32)[down] -= 1
        known.add(fingerprint(changed))
    known |= {fingerprint(tensor.roll(1, 0)), fingerprint(tensor.roll(2, 1)), fingerprint(tensor.flip(0))}
    assert len(known) == 3 + 5 + 50 + 3
    whole = torch.zeros(400 * 1024 + 1)
    whole[1:] = tensor.view(-1)
    for same in (tensor.t().contiguous().t(), whole[1:].view(400, 1024)):
        assert fingerprint(same) == fingerprint(tensor)


def test_file_digest(tmp_path):
    path = tmp_path / "requests.json"
    path.write_bytes(b"abc" * 700_000)  # more than one chunk
    digest = file_digest(path)
    if shutil.which("b2sum"):
        result = subprocess.run(["b2sum", "-l", "256", path], capture_output=True, text=True, check=True)
        assert result.stdout.split()[0] == digest
    path.write_bytes(b"abc" * 699_999 + b"abd")
    assert file_digest(path) != digest
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "none")

"""The hash of a model's weights: every change shows, and threads and pieces leave no trace."""

import hashlib

import pytest
import torch
from torch import nn

from grass_lib.attribution import model_hash
from grass_lib.attribution.model_hash import model_sha256


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(24.0))
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).mT)  # not contiguous
        self.small = nn.Parameter(torch.full((3,), 0.5, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("empty", torch.zeros(0, 5))


def by_hand(model, piece):
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        content = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        for first in range(0, max(1, len(content)), piece):
            digest.update(hashlib.sha256(content[first : first + piece]).digest())
    return digest.hexdigest()


@pytest.mark.parametrize("piece", [5, 16, 2**26])
def test_it_is_what_it_says(monkeypatch, piece):
    monkeypatch.setattr(model_hash, "PIECE", piece)
    assert model_sha256(Model()) == by_hand(Model(), piece)


def test_the_number_of_threads_does_not_matter(monkeypatch):
    monkeypatch.setattr(model_hash, "PIECE", 8)
    many = model_sha256(Model())
    monkeypatch.setattr(model_hash, "_THREADS", 1)
    assert model_sha256(Model()) == many


@pytest.mark.parametrize("name", ["weight", "small", "count"])
def test_one_changed_value_shows(name):
    model, other = Model(), Model()
    with torch.no_grad():
        getattr(other, name).view(-1)[-1:].add_(1)
    assert model_sha256(other) != model_sha256(model)


def test_type_and_shape_show():
    model, other = Model(), Model()
    other.small = nn.Parameter(model.small.detach().view(torch.float16))
    assert model_sha256(other) != model_sha256(model)
    other = Model()
    other.weight = nn.Parameter(model.weight.detach().view(4, 6))
    assert model_sha256(other) != model_sha256(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("stage", [2**24, 4096, 1001])
def test_a_gpu_and_the_cpu_agree(monkeypatch, stage):
    monkeypatch.setattr(model_hash, "STAGE", stage)
    monkeypatch.setattr(model_hash, "PIECE", 70_000)
    models = Model(), nn.Linear(300, 500)
    here = [model_sha256(model) for model in models]
    assert [model_sha256(model.cuda()) for model in models] == here


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_the_device_still_computes_is_waited_for():
    model, other = (nn.Linear(4096, 4096, bias=False).cuda() for _ in range(2))
    with torch.no_grad():
        torch.cuda._sleep(200_000_000)
        other.weight.copy_(model.weight)
    assert model_sha256(other) == model_sha256(model)

import pytest
import torch
import zoo

from grass_lib import TRAK, InfluenceFunction, TracIn, build_projector
from grass_lib.attribution.compress import compress
from grass_lib.devices import device_of_model, known_device, usable_device
from grass_lib.errors import UsageError
from grass_lib.gradients import MaskedGradients, PerSampleGradients, cross_entropy, margin, project_loader
from grass_lib.masks.layer_samples import collect
from grass_lib.masks.source import GradientSource
from grass_lib.masks.uniform import fit_random
from grass_lib.store import GradientStore

model = zoo.make_model("mlp")


def make_store(folder):
    store = GradientStore.create(folder, layers={"a": 2}, n_samples=1, fingerprint={})
    store.write(0, {"a": torch.ones(1, 2)})
    return store


CALLS = {
    "influence": lambda device, _: InfluenceFunction(model, cross_entropy, device=device),
    "trak": lambda device, _: TRAK(model, [model.state_dict()], device=device),
    "tracin": lambda device, _: TracIn(model, [model.state_dict()], device=device),
    "full": lambda device, _: PerSampleGradients(model, margin, device=device),
    "masked": lambda device, _: MaskedGradients(model, margin, torch.arange(3), device=device),
    "projector": lambda device, _: build_projector("sjlt-8", 20, device=device),
    "random mask": lambda device, _: fit_random(9, 3, device=device),
    "layer masks": lambda device, _: collect(model, cross_entropy, [], device=device),
    "source": lambda device, _: GradientSource(lambda: iter([]), 1, 1, device),
    "loader": lambda device, _: project_loader(PerSampleGradients(model, margin), None, [], {}, store_device=device),
    "compress": lambda device, folder: compress(make_store(folder / "a"), folder / "b", dtype="int8", device=device),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_device_that_is_not_here_is_one_sentence_wherever_it_is_given(call, tmp_path):
    with pytest.raises(UsageError, match=r"device is 'gpu'; expected cpu or cuda"):
        call("gpu", tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match=r"device is 'cuda:0', but no GPU is usable here; expected cpu"):
            call(torch.device("cuda:0"), tmp_path)


def test_a_gpu_that_this_machine_lacks_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert known_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match=r"'cuda:2', but the GPUs here are cuda:0 to cuda:1"):
        known_device("cuda:2")


def test_what_pytorch_refuses_is_told(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("Torch not compiled with that\nand a stack")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(UsageError, match=r"not usable here \(Torch not compiled with that\); expected cpu or cuda"):
        usable_device("cpu")


@pytest.mark.parametrize("device", [None, 1.5])
def test_other_types_are_refused(device):
    with pytest.raises(UsageError, match=f"device is {device}; expected cpu"):
        usable_device(device)


def test_a_model_stays_where_it_is():
    assert device_of_model(model, "cpu") == device_of_model(model, None) == torch.device("cpu")
    with pytest.raises(UsageError, match=r"model is on cpu, and device is meta; move the model"):
        device_of_model(model, "meta")
    with pytest.raises(UsageError, match=r"Tanh has no weights"):
        device_of_model(torch.nn.Tanh(), None)

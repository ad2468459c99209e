"""Bad arguments of `build_projector` and of projectors."""

import pytest
import torch

from grass_lib.errors import SpecError, UsageError
from grass_lib.projection import Mask, Projector, build_projector
from grass_lib.specs import CompressionSpec, StageSpec


@pytest.mark.parametrize("spec", ["sjlt-8", StageSpec.parse("sjlt-8"), CompressionSpec.parse("sjlt-8")])
def test_three_forms_of_a_spec(spec):
    projector = build_projector(spec, 20)
    assert isinstance(projector, Projector)
    assert str(projector.spec) == "sjlt-8"
    assert (projector.p, projector.k, projector.backend) == (20, 8, "torch")
    assert (projector.device, projector.dtype) == (torch.device("cpu"), torch.float32)
    assert "sjlt-8" in repr(projector)
    assert torch.equal(projector(torch.eye(20)), build_projector("sjlt-8", 20)(torch.eye(20)))


@pytest.mark.parametrize(
    ("text", "p"),
    [
        ("random_mask-11", 10),
        ("fjlt-11", 10),
        ("grass-3", 10),
        ("grass_11-1", 10),
        ("random_mask-11->sjlt-4", 10),
        ("sjlt-5->fjlt-6", 10),
    ],
)
def test_too_few_inputs(text, p):
    with pytest.raises(SpecError, match="input coordinates or more, and there are"):
        build_projector(text, p)


@pytest.mark.parametrize("text", ["normal-11", "rademacher-11", "sjlt-11", "sjlt_3-11"])
def test_more_outputs_than_inputs(text):
    assert build_projector(text, 3)(torch.ones(2, 3)).shape == (2, 11)


@pytest.mark.parametrize("spec", ["random_mask-4*4->sjlt-8", "random_mask-4*4->identity", StageSpec("normal", (2, 2))])
def test_factored_specs_are_refused(spec):
    with pytest.raises(SpecError, match="factored"):
        build_projector(spec, 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 0}, "p is 0; expected"),
        ({"p": 10.0}, "p is 10.0; expected"),
        ({"p": True}, "p is True; expected"),
        ({"dtype": torch.int64}, "dtype is torch.int64; expected"),
        ({"backend": "cuda"}, "backend is 'cuda'; expected one of auto, torch, kernel, sjlt, fast_jl"),
        ({"device": "no_such_device"}, "device is 'no_such_device'; expected cpu or cuda"),
        ({"seed": 1.5}, "seed is 1.5; expected an int"),
        ({"name": None}, "name is None; expected a str"),
        ({"checkpoint": -1}, "checkpoint is -1; expected"),
        ({"mask": Mask(torch.tensor([1]), 10)}, "takes no mask"),
        ({"spec": "selective_mask-1"}, "needs a mask"),
        ({"spec": "selective_grass-1"}, "needs a mask"),
        ({"spec": "selective_mask-4->selective_mask-2", "mask": Mask(torch.tensor([1]), 10)}, "two masks"),
        ({"spec": "sjlt4"}, "nearest valid form: sjlt-4"),
        ({"spec": 7}, "expected a string"),
    ],
)
def test_bad_arguments(arguments, message):
    call = {"spec": "sjlt-4", "p": 10, **arguments}
    with pytest.raises(UsageError) as caught:
        build_projector(call.pop("spec"), call.pop("p"), **call)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["normal-4", "sjlt-4", "fjlt-4", "random_mask-4", "grass-2", "identity"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 9), "got shape (2, 9); expected (..., 10)"),
        (torch.ones(10, 2), "expected (..., 10)"),
        (torch.tensor(1.0), "got shape (); expected (..., 10)"),
        (torch.ones(2, 10, dtype=torch.int64), "got torch.int64; expected a tensor of a floating type"),
        (torch.ones(2, 10, dtype=torch.complex64), "floating type"),
        ([1.0] * 10, "got list; expected a tensor"),
        (torch.ones(2, 10, device="meta"), "was built for cpu, and the input is on meta"),
    ],
)
def test_bad_inputs(text, x, message):
    with pytest.raises(UsageError) as caught:
        build_projector(text, 10)(x)
    assert message in str(caught.value)
    assert text in str(caught.value)


def test_global_random_state_does_not_matter_and_does_not_move():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = build_projector("grass-3", 40)(torch.eye(40))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(build_projector("grass-3", 40)(torch.eye(40)), first)

"""A training step against AdamW itself, and the recorded step against the same kernels one by one."""

import pytest
import torch
from torch import nn

from grass_lib.experiments.training_step import TrainingStep


def model_and_ids(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Flatten(), nn.Linear(8 * 5, 3)).to(device)
    return model, torch.randint(0, 11, (10, 5)).to(device)


def loss(model, ids):
    return model(ids).square().mean()


def by_hand(model, batches, rates):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
    for ids, rate in zip(batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss(model, ids).backward()
        optimizer.step()


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
        ),
    ],
)
def test_the_same_weights_as_by_hand_in_every_training(device):
    model, ids = model_and_ids(device)
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}
    rates = [0.01, 0.02, 0.005, 0.01, 0.003, 0.02]
    step = TrainingStep(model, loss, batch_size=4, weight_decay=0.1)
    for turn in range(2):
        data = ids.roll(turn, 0)
        batches = [*data.split(4), *data.flip(0).split(4)]
        step.restart(data)
        model.load_state_dict(start)
        for batch, rate in zip(batches, rates, strict=True):
            step(batch, rate)
        other, _ = model_and_ids(device)
        other.load_state_dict(start)
        by_hand(other, batches, rates)
        for found, wanted in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert (step._graph is not None) == (device == "cuda")

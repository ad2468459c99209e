"""The model against relative attention computed number by number in float64."""

import math
import warnings

import numpy as np
import pytest
import torch

from grass_lib.errors import UsageError
from grass_lib.experiments.data.events import PAD, VOCABULARY
from grass_lib.experiments.models.music_transformer import (
    MusicSizes,
    RelativeAttention,
    build_music_transformer,
    initial_weights,
    parameter_count,
    sinusoids,
)
from grass_lib.gradients import margin
from grass_lib.gradients.full import PerSampleGradients
from grass_lib.rng import Stream

SMALL = MusicSizes(layers=2, width=12, heads=3, feedforward=10, length=9)


def model_and_ids(sizes=SMALL, length=9, n=4):
    model = build_music_transformer(sizes, 0.0)
    model.load_state_dict(initial_weights(sizes, Stream(0, "test")))
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(0, 388, (n, length), generator=generator)


def naive_attention(x, weights, heads):
    """One query, one head, one distance at a time."""
    length, width = x.shape
    size = width // heads
    q = x @ weights["query.weight"].T + weights["query.bias"]
    k, v = np.split(x @ weights["key_value.weight"].T + weights["key_value.bias"], 2, axis=1)
    table = weights["relative"]
    out = np.zeros((length, width))
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(length):
            logits = [
                (q[i, part] @ k[j, part] + q[i, part] @ table[len(table) - 1 - (i - j)]) / math.sqrt(size)
                for j in range(i + 1)
            ]
            share = np.exp(np.array(logits) - max(logits))
            share /= share.sum()
            out[i, part] = sum(share[j] * v[j, part] for j in range(i + 1))
    return out @ weights["out.weight"].T + weights["out.bias"]


def naive_model(model, ids):
    """Logits after the last event of one window, in float64."""
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(axis=1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    width = model.sizes.width
    x = weights["embedding.weight"][ids]
    for place in range(len(ids)):
        for i in range(0, width, 2):
            angle = place / 10000 ** (i / width)
            x[place, i : i + 2] += math.sin(angle), math.cos(angle)
    for n in range(model.sizes.layers):
        own = {name.removeprefix(f"layers.{n}.attention."): value for name, value in weights.items()}
        x = norm(x + naive_attention(x, own, model.sizes.heads), f"layers.{n}.norm1")
        inner = np.maximum(linear(x, f"layers.{n}.linear1"), 0)
        x = norm(x + linear(inner, f"layers.{n}.linear2"), f"layers.{n}.norm2")
    return linear(norm(x[-1:], "norm"), "head")[0]


def test_sizes_of_the_paper():
    assert parameter_count(MusicSizes()) == 13_115_782
    assert (MusicSizes().length, VOCABULARY) == (256, 390)


@pytest.mark.parametrize("length", [9, 5, 1])
def test_attention_is_that_of_the_definition(length):
    torch.manual_seed(0)
    layer = RelativeAttention(SMALL, 0.0).double()
    x = torch.randn(2, length, 12, dtype=torch.float64)
    weights = {name: value.detach().numpy() for name, value in layer.state_dict().items()}
    expected = torch.stack([torch.from_numpy(naive_attention(part.numpy(), weights, 3)) for part in x])
    for training in (False, True):
        layer.train(training)
        torch.testing.assert_close(layer(x), expected)
        for last in ([length - 1, 0], [0, length // 2]):
            found = layer(x, torch.tensor(last))
            torch.testing.assert_close(found[:, 0], expected[torch.arange(2), torch.tensor(last)])


def test_model_is_that_of_the_definition():
    model, ids = model_and_ids()
    found = model.double()(ids)
    for row, logits in zip(ids, found, strict=True):
        np.testing.assert_allclose(logits.detach().numpy(), naive_model(model, row.numpy()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.head(model.hidden(ids)[:, -1]), found)


def test_padding_counts_nowhere():
    model, ids = model_and_ids()
    padded = ids.clone()
    for row, count in enumerate((9, 4, 1, 6)):
        padded[row, count:] = PAD
    found = model(padded)
    for row, count in enumerate((9, 4, 1, 6)):
        torch.testing.assert_close(found[row], model(ids[row : row + 1, :count])[0])


def test_training_and_evaluation_compute_the_same_without_dropout():
    model, ids = model_and_ids()
    expected, labels = model(ids), torch.tensor([3, 388, 200, 0])
    torch.nn.functional.cross_entropy(expected, labels).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    found = model.train()(ids)
    torch.testing.assert_close(found, expected)
    torch.nn.functional.cross_entropy(found, labels).backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_per_sample_gradients_are_those_of_each_sample_alone():
    model, ids = model_and_ids()
    ids[1, 5:] = PAD
    labels = torch.tensor([3, 388, 200, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a part that has to be computed sample by sample warns
        rows, values = PerSampleGradients(model, margin)(None, (ids, labels))
    for i in range(4):
        model.zero_grad()
        value = margin(model, (ids[i : i + 1], labels[i : i + 1]))
        value.backward()
        expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        torch.testing.assert_close(rows[i], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(values[i], value[0])


def test_initial_weights_come_from_their_stream():
    before = torch.random.get_rng_state()
    first = initial_weights(SMALL, Stream(0, "a"))
    build_music_transformer(SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, first[name]) for name, value in initial_weights(SMALL, Stream(0, "a")).items())
    other = initial_weights(SMALL, Stream(1, "a"))
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert list(first) == [name for name, _ in build_music_transformer(SMALL).named_parameters()]
    wide = initial_weights(MusicSizes(layers=1, width=128, heads=2, feedforward=64, length=32), Stream(0, "b"))
    assert wide["embedding.weight"].std() == pytest.approx(1.0, abs=0.02)
    for name, total in (("attention.query", 4 * 128), ("attention.key_value", 4 * 128), ("linear1", 192)):
        values = wide[f"layers.0.{name}.weight"]
        assert values.abs().max() <= math.sqrt(6 / total)
        assert values.std() == pytest.approx(math.sqrt(2 / total), rel=0.03)
    assert all(
        float(value.sum()) == (len(value) if "norm" in name and "weight" in name else 0)
        for name, value in wide.items()
        if value.dim() == 1
    )


def test_sinusoids():
    table = sinusoids(30, 8)
    assert table.shape == (30, 8)
    assert table[0].tolist() == [0, 1] * 4
    assert table[7, 5] == pytest.approx(math.cos(7 / 100), abs=1e-6)


@pytest.mark.parametrize("change", [{"layers": 0}, {"heads": 5}, {"width": 9, "heads": 3}, {"length": 0}])
def test_sizes_that_cannot_be(change):
    with pytest.raises(UsageError, match="expected"):
        MusicSizes(**{"layers": 2, "width": 12, "heads": 3, "feedforward": 10, "length": 9, **change})

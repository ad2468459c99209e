"""Attribution from kept coordinates alone gives the scores of the full gradients, and says what it does."""

import math

import pytest
import torch
import zoo
from torch import nn

from grass_lib.attribution import TRAK, GradientCosine, TracIn
from grass_lib.errors import UsageError
from grass_lib.projection import Mask, build_projector
from grass_lib.projection.restricted import RestrictedProjector, leading_mask

N, M = 17, 5
SPECS = [
    "random_mask-10",
    "random_mask-20->sjlt-8",
    "grass_2-8",
    "random_mask-30->normal-6",
    "random_mask-40->grass_2-6",
    "grass_3-10->rademacher-7",
    "selective_mask-7",
    "selective_grass_2-5",
]


def states(name="mlp", n=2, dtype=torch.float32):
    return [zoo.make_model(name, seed=10 + c, dtype=dtype).state_dict() for c in range(n)]


def loaders(name="mlp", batch_size=4, dtype=torch.float32):
    train = zoo.make_samples(name, N, dtype=dtype)
    query = zoo.make_samples(name, M, seed=2, dtype=dtype)
    return zoo.make_loader(train, batch_size, name), zoo.make_loader(query, batch_size, name)


def masks(p=53):
    def one(k, seed):
        return Mask(torch.randperm(p, generator=torch.Generator().manual_seed(seed))[:k].sort().values, p)

    return {"selective_mask-7": [one(7, 0), one(7, 1)], "selective_grass_2-5": one(10, 2)}


def run(route, dtype=torch.float64, name="mlp", batch_size=4, method=TRAK, **options):
    train, query = loaders(name, batch_size, dtype)
    options = {"specs": SPECS, "masks": masks()} | options
    model = zoo.make_model(name, dtype=dtype)
    attributor = method(model, states(name, dtype=dtype), dtype=dtype, gradients=route, **options)
    attributor.cache(train)
    return attributor, attributor.attribute(query)


@pytest.mark.parametrize("method", [TRAK, TracIn, GradientCosine])
def test_masks_that_no_spec_takes_are_refused(method):
    model, mask = zoo.make_model("mlp"), masks()["selective_grass_2-5"]
    for given in (mask, [mask, mask], {"sjlt-8": mask}):
        with pytest.raises(UsageError, match=r"masks are given, and 'sjlt-8' takes none; leave them out, or use a"):
            method(model, states("mlp"), projection="sjlt-8", masks=given)
    specs = ["sjlt-8", "selective_grass_2-5"]
    with pytest.raises(UsageError, match="'sjlt-8' takes none"):
        method(model, states("mlp"), specs=specs, masks={spec: mask for spec in specs})
    assert method(model, states("mlp"), specs=specs, masks=mask).n_train == 0
    assert method(model, states("mlp"), specs=specs, masks=masks()).n_train == 0
    for given in ({}, {"selective_grass_2-5": mask}):  # one dict may serve several calls
        assert method(model, states("mlp"), projection="sjlt-8", masks=given).n_train == 0


@pytest.mark.parametrize("convention", ["relative", "paper"])
def test_scores_and_features_are_those_of_full_gradients(convention):
    full, expected = run("full", convention=convention)
    masked, scores = run("masked", convention=convention)
    for index in range(2):
        for spec in SPECS:
            torch.testing.assert_close(masked._train[index][spec], full._train[index][spec], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(masked._train_values[index], full._train_values[index], atol=1e-10, rtol=1e-10)
    for spec in SPECS:
        assert scores[spec].shape == (N, M)
        scale = float(expected[spec].abs().max())
        torch.testing.assert_close(scores[spec], expected[spec], atol=1e-7 * scale, rtol=0)


def test_float32_features_agree_to_a_hundred_thousandth():
    full, _ = run("full", torch.float32)
    masked, _ = run("masked", torch.float32)
    for spec in SPECS:
        expected = full._train[1][spec]
        torch.testing.assert_close(masked._train[1][spec], expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("name", ["frozen", "named", "normed", "tied", "twice", "unused"])
def test_awkward_models(name):
    options = {"specs": ["random_mask-20", "grass_2-6"], "masks": None}
    _, expected = run("full", name=name, **options)
    attributor, scores = run("auto", name=name, **options)
    assert attributor.gradients == "masked"
    for spec, found in scores.items():
        torch.testing.assert_close(found, expected[spec], atol=1e-8 * float(expected[spec].abs().max()), rtol=0)


@pytest.mark.parametrize("method", [TracIn, GradientCosine])
def test_other_attributors(method):
    _, expected = run("full", method=method)
    attributor, scores = run("auto", method=method)
    assert attributor.gradients == "masked"
    for spec, found in scores.items():
        torch.testing.assert_close(found, expected[spec], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 50}, {"micro_batch": 2}, {"buffer_bytes": 1}])
def test_batches_micro_batches_and_buffers_change_nothing(options):
    _, expected = run("masked")
    _, scores = run("masked", **options)
    for spec, found in scores.items():
        torch.testing.assert_close(found, expected[spec], atol=1e-7 * float(expected[spec].abs().max()), rtol=0)


def test_one_pass_serves_all_specs():
    for micro_batch, step in ((None, 4), (2, 2)):
        masked, _ = run("masked", micro_batch=micro_batch)
        sizes = [4, 4, 4, 4, 1], [4, 1]
        assert masked.model_calls == 2 * sum(math.ceil(size / step) for loader in sizes for size in loader)


def test_the_choice_is_visible_and_can_be_forced():
    model, checkpoints = zoo.make_model("mlp"), states()
    auto = TRAK(model, checkpoints, sparsification="random_mask-20", projection="sjlt-8")
    assert (auto.gradients, auto.gradients_reason) == ("masked", "every spec begins with a mask")
    assert auto.backends == {"random_mask-20->sjlt-8": "torch+masked"}
    full = TRAK(model, checkpoints, sparsification="random_mask-20", projection="sjlt-8", gradients="full")
    assert (full.gradients, full.gradients_reason) == ("full", "asked for")
    assert full.backends == {"random_mask-20->sjlt-8": "torch"}
    mixed = TRAK(model, checkpoints, specs=["random_mask-20", "sjlt-8"])
    assert (mixed.gradients, mixed.gradients_reason) == ("full", "sjlt-8 begins with no mask")
    assert TRAK(model, checkpoints).gradients == "full"
    with pytest.raises(UsageError, match="sjlt-8 does not"):
        TRAK(model, checkpoints, specs=["random_mask-20", "sjlt-8"], gradients="masked")
    with pytest.raises(UsageError, match="expected one of auto, full, masked"):
        TRAK(model, checkpoints, projection="random_mask-20", gradients="fast")


class Whole(nn.Module):
    """Most of the weights are a parameter that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(zoo.FEATURES, 20, generator=torch.Generator().manual_seed(0)))
        self.head = nn.Linear(20, zoo.CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(x @ self.matrix))


def test_models_of_unknown_layers_get_full_gradients_unless_asked():
    train, query = loaders()
    found, state = {}, Whole().state_dict()
    for route in ("auto", "masked"):
        trak = TRAK(Whole(), [state], projection="random_mask-30", gradients=route)
        trak.cache(train)
        found[route] = trak.gradients, trak.gradients_reason, trak.attribute(query)
    assert found["auto"][:2] == ("full", "120 of 183 weights belong to layers that are not known by kind")
    assert found["masked"][:2] == ("masked", "asked for; whole gradients are formed for 120 weights")
    scale = float(found["auto"][2].abs().max())
    torch.testing.assert_close(found["masked"][2], found["auto"][2], atol=1e-3 * scale, rtol=0)


@pytest.mark.parametrize("spec", ["random_mask-10", "random_mask-20->sjlt-8", "grass_2-8", "random_mask-40->grass_2-6"])
def test_restricted_projectors_are_the_projectors(spec):
    projector = build_projector(spec, 60, seed=3, checkpoint=1, dtype=torch.float64)
    kept = torch.cat([leading_mask(projector)[0].indices, torch.arange(0, 60, 7)]).unique()
    x = torch.randn(4, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    restricted = RestrictedProjector(projector, kept)
    assert (restricted.p, restricted.k, restricted.paper_scale) == (len(kept), projector.k, projector.paper_scale)
    rows = x[:, kept]
    torch.testing.assert_close(restricted(rows), projector(x), atol=1e-14, rtol=0)
    assert torch.equal(rows, x[:, kept])
    alone = leading_mask(projector)[0].indices
    torch.testing.assert_close(RestrictedProjector(projector, alone)(x[:, alone]), projector(x), atol=1e-14, rtol=0)
    with pytest.raises(UsageError, match="not among the"):
        RestrictedProjector(projector, kept[kept != alone[3]])
    with pytest.raises(UsageError, match="does not begin with a mask"):
        RestrictedProjector(build_projector("sjlt-8", 60), kept)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["auto", "torch", "kernel"])
@pytest.mark.parametrize("name", ["mlp", "normed", "tied"])
def test_gpu_gives_the_features_of_full_gradients_on_a_cpu(name, backend):
    specs = ["random_mask-10", "random_mask-20->sjlt-8", "grass_2-8"]
    full, _ = run("full", torch.float32, name, specs=specs, masks=None)
    masked, _ = run("auto", torch.float32, name, specs=specs, masks=None, device="cuda", backend=backend)
    assert masked.gradients == "masked"
    for spec in specs:
        expected, found = full._train[1][spec], masked._train[1][spec]
        assert found.device.type == "cuda"
        torch.testing.assert_close(found.cpu(), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)

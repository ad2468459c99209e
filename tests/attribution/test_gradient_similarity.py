import copy
import math

import pytest
import torch
import zoo

from grass_lib.attribution import GradientCosine, TracIn
from grass_lib.errors import UsageError
from grass_lib.gradients import cross_entropy
from grass_lib.projection import build_projector

N, M = 11, 5
RATES = [0.1, 0.5]


def states():
    return [zoo.make_model("mlp", seed=10 + c).state_dict() for c in range(2)]


def loaders(batch_size: int = 4):
    train, query = zoo.make_samples("mlp", N), zoo.make_samples("mlp", M, seed=2)
    return zoo.make_loader(train, batch_size), zoo.make_loader(query, batch_size)


def loss_gradients(state, samples):
    model = zoo.make_model("mlp")
    model.load_state_dict(state)
    x, y = samples[0].double(), samples[1]

    def value_of(used, i):
        return torch.nn.functional.cross_entropy(used(x[i : i + 1]), y[i : i + 1])

    return zoo.loop_gradients(model.double().eval(), value_of, len(y))


def projected(spec, c):
    train = loss_gradients(states()[c], zoo.make_samples("mlp", N))
    query = loss_gradients(states()[c], zoo.make_samples("mlp", M, seed=2))
    matrix = build_projector(spec, train.shape[1], checkpoint=c, dtype=torch.float64)(
        torch.eye(train.shape[1], dtype=torch.float64)
    )
    return train @ matrix, query @ matrix


SPECS = ["identity", "sjlt-8", "random_mask-12"]


def test_tracin_agrees_with_the_definition():
    tracin = TracIn(zoo.make_model("mlp"), states(), specs=SPECS, learning_rates=RATES)
    train, query = loaders()
    tracin.cache(train)
    found = tracin.attribute(query)
    for spec in SPECS:
        expected = sum(
            rate * torch.matmul(*(v if i == 0 else v.T for i, v in enumerate(projected(spec, c))))
            for c, rate in enumerate(RATES)
        )
        torch.testing.assert_close(found[spec].double(), expected, atol=1e-5, rtol=1e-4)


def test_cosine_agrees_with_the_definition():
    cosine = GradientCosine(zoo.make_model("mlp"), states(), specs=SPECS)
    train, query = loaders()
    cosine.cache(train)
    found = cosine.attribute(query)
    for spec in SPECS:
        expected = torch.zeros(N, M, dtype=torch.float64)
        for c in range(2):
            left, right = projected(spec, c)
            for i in range(N):
                for j in range(M):
                    size = math.sqrt(float(left[i] @ left[i]) * float(right[j] @ right[j]))
                    expected[i, j] += float(left[i] @ right[j]) / size / 2
        torch.testing.assert_close(found[spec].double(), expected, atol=1e-5, rtol=1e-4)


def test_a_training_step_lowers_the_loss_of_queries_by_the_tracin_score():
    x, y = zoo.make_samples("mlp", N, dtype=torch.float64)
    qx, qy = zoo.make_samples("mlp", M, seed=2, dtype=torch.float64)
    model = zoo.make_model("mlp", dtype=torch.float64)
    rate = 1e-6
    tracin = TracIn(model, [model.state_dict()], learning_rates=rate, dtype=torch.float64)
    tracin.cache(zoo.make_loader((x, y)))
    scores = tracin.attribute(zoo.make_loader((qx, qy)))
    before = cross_entropy(copy.deepcopy(model).eval(), (qx, qy)).detach()
    for index in range(N):
        trained = copy.deepcopy(model).eval()
        optimizer = torch.optim.SGD(trained.parameters(), lr=rate)
        torch.nn.functional.cross_entropy(trained(x[index : index + 1]), y[index : index + 1]).backward()
        optimizer.step()
        lowered = before - cross_entropy(trained, (qx, qy)).detach()
        torch.testing.assert_close(scores[index], lowered, atol=1e-4 * float(scores.abs().max()), rtol=1e-3)


class Still(torch.nn.Module):
    """Its gradient is the input itself."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x @ self.weight


def test_zero_and_tiny_gradients_have_a_cosine():
    rows = torch.tensor([[0.0, 0.0, 0.0], [1e-30, 0.0, 0.0], [1e30, 0.0, 0.0], [-2.0, 0.0, 0.0]])
    cosine = GradientCosine(Still(), [Still().state_dict()], output=lambda model, batch: model(batch[0]))
    cosine.cache([(rows,)])
    found = cosine.attribute([(rows,)])
    expected = torch.tensor([[0.0, 0, 0, 0], [0, 1, 1, -1], [0, 1, 1, -1], [0, -1, -1, 1]])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [TracIn, GradientCosine])
def test_batches_change_nothing_and_one_pass_serves_all_specs(kind):
    results = []
    for batch_size in (4, 1):
        attributor = kind(zoo.make_model("mlp"), states(), projection="sjlt-8", micro_batch=3)
        train, query = loaders(batch_size)
        attributor.cache(train)
        results.append(attributor.attribute(query))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-4)
    several = kind(zoo.make_model("mlp"), states(), specs=SPECS)
    train, query = loaders()
    several.cache(train)
    several.attribute(query)
    assert several.model_calls == 2 * (math.ceil(N / 4) + math.ceil(M / 4))


def test_bad_input_is_refused():
    for rates, message in (([0.1], "1 learning rates for 2"), ([0.1, -1.0], "-1.0"), (float("nan"), "nan")):
        with pytest.raises(UsageError, match=message):
            TracIn(zoo.make_model("mlp"), states(), learning_rates=rates)
    with pytest.raises(UsageError, match="call cache"):
        GradientCosine(zoo.make_model("mlp"), states()).attribute(loaders()[1])
    with pytest.raises(UsageError, match="seed is -1"):
        GradientCosine(zoo.make_model("mlp"), states(), seed=-1)

import math

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from grass_lib.errors import UsageError
from grass_lib.evaluation import BankPlan, Member
from grass_lib.experiments.base import resolve_device
from grass_lib.experiments.models.mlp import HIDDEN, MLP, initial_weights, stacked_logits
from grass_lib.experiments.training import ModelStreams, Recipe, epoch_orders, one_cpu_thread, train_stacked
from grass_lib.rng import Stream

CPU = torch.device("cpu")
RECIPE = Recipe(lr=0.05, epochs=3, batch_size=16)
PLAN = BankPlan(n_train=80, n_models=4, second_seed_share=0.0)


def data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(80, 784, generator=generator).to(dtype), torch.randint(0, 10, (80,), generator=generator)


def train(members, recipe=RECIPE, dtype=torch.float32, plan=PLAN):
    x, y = data(dtype)
    states = [initial_weights(member.stream("init")) for member in members]
    stacked = {name: torch.stack([state[name] for state in states]).to(dtype) for name in states[0]}
    streams = [ModelStreams(member.stream("order"), member.stream("dropout")) for member in members]
    subsets = torch.stack([plan.subset_indices(member.index) for member in members])
    return train_stacked(stacked_logits, stacked, x, y, subsets, streams, recipe, HIDDEN)


def train_alone(member, recipe=RECIPE, plan=PLAN):
    """One model from scratch: a plain module, a plain optimiser, a mask per step, float64."""
    x, y = data(torch.float64)
    rows = plan.subset_indices(member.index)
    model = MLP(0.0).double()
    model.load_state_dict(initial_weights(member.stream("init")))
    optimiser = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    n = len(rows)
    for epoch in range(recipe.epochs):
        order = epoch_orders(member.stream("order"), n, range(epoch, epoch + 1), CPU)[0]
        for start in range(0, n, recipe.batch_size):
            chosen = rows[order[start : start + recipe.batch_size]]
            offset = (epoch * n + start) * HIDDEN
            keep = member.stream("dropout").keep_mask((len(chosen), HIDDEN), recipe.dropout, offset=offset)
            keep = keep.double() / (1 - recipe.dropout)
            hidden = functional.relu(model.fc1(x[chosen])) * keep[:, :128]
            hidden = functional.relu(model.fc2(hidden)) * keep[:, 128:]
            optimiser.zero_grad()
            functional.cross_entropy(model.fc3(hidden), y[chosen]).backward()
            optimiser.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def members(n=4, repeat=0):
    return [Member(0, "lds", index, repeat) for index in range(n)]


def test_the_mlp_has_the_papers_parameters():
    assert sum(parameter.numel() for parameter in MLP().parameters()) == 109_386
    assert MLP().dropout.p == 0.1


def test_stacked_logits_are_those_of_each_model():
    model = MLP().eval()
    states = [initial_weights(member.stream("init")) for member in members(3)]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    x = data()[0]
    logits = stacked_logits(stacked, x)
    each = torch.stack([functional_call(model, state, (x,)) for state in states])
    torch.testing.assert_close(logits, each)
    torch.testing.assert_close(stacked_logits(stacked, x.expand(3, -1, -1)), each)


def test_group_equals_models_trained_alone_from_scratch():
    # 40 samples in batches of 16: the last step of an epoch has 8
    group = train(members(), dtype=torch.float64)
    for index, member in enumerate(members()):
        alone = train_alone(member)
        assert list(alone) == list(group)
        for name, value in alone.items():
            torch.testing.assert_close(group[name][index], value, atol=1e-10, rtol=0)


def test_group_composition_changes_a_model_only_by_rounding():
    group, alone = train(members()), train(members()[2:3])
    other = train([Member(0, "trak", 1), members()[2]])
    for name in group:
        torch.testing.assert_close(alone[name][0], group[name][2], atol=1e-5, rtol=0)
        torch.testing.assert_close(other[name][1], group[name][2], atol=1e-5, rtol=0)
        assert not torch.allclose(other[name][0], group[name][1], atol=1e-3)


def test_same_group_gives_the_same_bits(monkeypatch):
    first = train(members())
    monkeypatch.setattr("grass_lib.experiments.training._CPU_BLOCK", 1)  # one epoch of masks at a time
    assert all(torch.equal(value, first[name]) for name, value in train(members()).items())


@pytest.mark.parametrize("change", [{"seed": 1}, {"role": "trak"}, {"repeat": 1}, {"index": 1}])
def test_any_other_name_is_another_model(change):
    fields = {"seed": 0, "role": "lds", "index": 0, "repeat": 0}
    one, other = Member(**fields), Member(**{**fields, **change})
    assert not torch.equal(
        initial_weights(one.stream("init"))["fc1.weight"], initial_weights(other.stream("init"))["fc1.weight"]
    )
    assert not torch.equal(
        epoch_orders(one.stream("order"), 40, range(2), CPU), epoch_orders(other.stream("order"), 40, range(2), CPU)
    )
    assert not torch.equal(one.stream("dropout").keep_mask(500, 0.1), other.stream("dropout").keep_mask(500, 0.1))


def test_initial_weights_have_the_distribution_of_linear_layers():
    ours = initial_weights(Stream(0, "model", "init"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = MLP().state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    for layer, fan_in in (("fc1", 784), ("fc2", 128), ("fc3", 64)):
        for name in (f"{layer}.weight", f"{layer}.bias"):
            assert ours[name].abs().max() <= 1 / math.sqrt(fan_in)
        values = ours[f"{layer}.weight"]
        # a uniform number within b has deviation b / sqrt(3); six standard errors of the mean and of the deviation
        error = 6 / math.sqrt(values.numel())
        assert abs(values.mean()) * math.sqrt(3 * fan_in) < error
        assert abs(values.std() * math.sqrt(3 * fan_in) - 1) < error
    assert ours["fc1.weight"].flatten()[:10].unique().numel() == 10
    assert not torch.equal(ours["fc1.bias"][:10], ours["fc2.bias"][:10])


def test_orders_are_permutations_that_do_not_depend_on_the_block():
    stream = Stream(0, "model", "order")
    orders = epoch_orders(stream, 50, range(6), CPU)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(50).expand(6, -1))
    assert len({tuple(row.tolist()) for row in orders}) == 6
    assert torch.equal(epoch_orders(stream, 50, range(4, 6), CPU), orders[4:])


def test_orders_are_uniform():
    first = epoch_orders(Stream(0, "model", "order"), 5, range(4000), CPU)[:, 0].bincount(minlength=5).double()
    # Binomial(4000, 1/5): standard deviation 25.3
    assert (first - 800).abs().max() < 5 * 25.3


def test_training_learns():
    x, y = data()
    before = {name: value[None] for name, value in initial_weights(members()[0].stream("init")).items()}
    after = train(members()[:1], Recipe(lr=0.05, epochs=15))
    rows = PLAN.subset_indices(0)
    losses = [functional.cross_entropy(stacked_logits(w, x[rows])[0], y[rows]) for w in (before, after)]
    assert losses[1] < 0.2 * losses[0]


def test_without_dropout():
    group = train(members()[:2], Recipe(lr=0.05, epochs=1, dropout=0.0))
    assert not torch.equal(group["fc1.weight"], train(members()[:2], Recipe(lr=0.05, epochs=1))["fc1.weight"])


def test_dropout_in_expectation():
    """The mean over masks of the masked output of a linear network is the output without a mask."""
    weights = {name: value[None] for name, value in initial_weights(Stream(0)).items()}
    weights["fc1.bias"] += 100.0  # no ReLU cuts
    weights["fc2.weight"] = weights["fc2.weight"].abs()
    x = data()[0][:1]
    keep = Stream(1).keep_mask((1, 4000, HIDDEN), 0.1) / 0.9
    many = stacked_logits(weights, x.expand(1, 4000, -1), keep)
    plain = stacked_logits(weights, x)
    assert ((many.mean(dim=1) - plain[:, 0]).abs() < 5 * many.std(dim=1) / math.sqrt(4000)).all()


def test_one_cpu_thread_is_restored_after_an_error():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []

    def fail():
        with one_cpu_thread():
            seen.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [1]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0.0), ("lr", float("nan")), ("momentum", 1.0), ("dropout", -0.1), ("epochs", 0), ("batch_size", 0)],
)
def test_bad_recipes(field, value):
    with pytest.raises(UsageError, match=field):
        Recipe(**{field: value})


def test_devices():
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="expected auto, cpu or cuda"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no GPU is usable"):
            resolve_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_trains_the_same_models():
    x, y = (part.cuda() for part in data())
    states = [initial_weights(member.stream("init")) for member in members()]
    stacked = {name: torch.stack([state[name] for state in states]).cuda() for name in states[0]}
    streams = [ModelStreams(member.stream("order"), member.stream("dropout")) for member in members()]
    subsets = torch.stack([PLAN.subset_indices(member.index) for member in members()])
    there, again = (train_stacked(stacked_logits, stacked, x, y, subsets, streams, RECIPE, HIDDEN) for _ in range(2))
    for name, value in train(members()).items():
        torch.testing.assert_close(there[name].cpu(), value, atol=1e-4, rtol=0)
        assert torch.equal(there[name], again[name])

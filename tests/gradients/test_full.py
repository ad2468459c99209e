import copy

import pytest
import torch
import zoo
from safetensors.torch import save_file
from torch import nn

from grass_lib.errors import GrassError, UsageError
from grass_lib.gradients import PerSampleGradients, cross_entropy, margin
from grass_lib.gradients.state import checkpoint_shapes, load_checkpoint

N = 9


def reference(name: str, samples, output=margin) -> torch.Tensor:
    model = zoo.make_model(name, dtype=torch.float64).eval()
    wide = tuple(value.double() if value.is_floating_point() else value for value in samples)

    def value_of(used, index):
        return output(used, zoo.make_batch(name, tuple(value[index : index + 1] for value in wide)))[0]

    return zoo.loop_gradients(model, value_of, len(samples[-1]))


@pytest.mark.parametrize("output", [margin, cross_entropy])
@pytest.mark.parametrize("name", sorted(zoo.MODELS))
def test_agrees_with_one_backward_pass_per_sample(name, output):
    samples = zoo.make_samples(name, N)
    gradients = PerSampleGradients(zoo.make_model(name), output)
    rows, values = gradients(None, zoo.make_batch(name, samples))
    expected = reference(name, samples, output)
    assert rows.dtype == torch.float32
    assert rows.shape == (N, gradients.p) == expected.shape
    torch.testing.assert_close(rows.double(), expected, atol=2e-6, rtol=2e-5)
    model = zoo.make_model(name).eval()
    torch.testing.assert_close(values, output(model, zoo.make_batch(name, samples)).detach())


def test_float64_rows_agree_to_rounding():
    samples = zoo.make_samples("twice", N, dtype=torch.float64)
    rows, _ = PerSampleGradients(zoo.make_model("twice", dtype=torch.float64), margin, dtype=torch.float64)(
        None, samples
    )
    torch.testing.assert_close(rows, reference("twice", samples), atol=1e-13, rtol=1e-12)


def test_counts_only_trainable_weights_and_tied_ones_once():
    hidden, head = zoo.FEATURES * zoo.HIDDEN + zoo.HIDDEN, zoo.HIDDEN * zoo.CLASSES + zoo.CLASSES
    assert PerSampleGradients(zoo.make_model("mlp"), margin).p == hidden + head
    assert PerSampleGradients(zoo.make_model("frozen"), margin).p == zoo.HIDDEN + head
    tied = PerSampleGradients(zoo.make_model("tied"), margin)
    assert tied.p == zoo.CLASSES * zoo.HIDDEN + zoo.HIDDEN**2 + zoo.HIDDEN
    only_head = PerSampleGradients(zoo.make_model("mlp"), margin, parameters=lambda name, _: name.startswith("head"))
    assert only_head.names == ["head.weight", "head.bias"]
    samples = zoo.make_samples("mlp", N)
    everything, _ = PerSampleGradients(zoo.make_model("mlp"), margin)(None, samples)
    torch.testing.assert_close(only_head(None, samples)[0], everything[:, hidden:])


def test_unused_weights_have_zero_gradient():
    gradients = PerSampleGradients(zoo.make_model("unused"), margin)
    rows, _ = gradients(None, zoo.make_samples("unused", N))
    assert gradients.names[-2:] == ["spare.weight", "spare.bias"]
    assert torch.count_nonzero(rows[:, -6:]) == 0
    assert torch.count_nonzero(rows[:, :-6]) > 0


@pytest.mark.parametrize("name", ["mlp", "normed", "tied"])
def test_batch_mates_do_not_influence_a_sample(name):
    samples = zoo.make_samples(name, N)
    other = zoo.make_samples(name, N, seed=99)
    mixed = tuple(torch.cat([mine[:3], theirs[3:]]) for mine, theirs in zip(samples, other, strict=True))
    gradients = PerSampleGradients(zoo.make_model(name), margin)
    rows, values = gradients(None, samples)
    mates, mate_values = gradients(None, mixed)
    torch.testing.assert_close(mates[:3], rows[:3], atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(mate_values[:3], values[:3], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(mates[3:], rows[3:])


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 9, 100])
def test_micro_batches_change_nothing_and_are_counted(micro_batch):
    samples = zoo.make_samples("normed", N)
    whole, values = PerSampleGradients(zoo.make_model("normed"), margin)(None, samples)
    gradients = PerSampleGradients(zoo.make_model("normed"), margin, micro_batch=micro_batch)
    rows, found = gradients(None, samples)
    torch.testing.assert_close(rows, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found, values, atol=1e-6, rtol=1e-5)
    assert gradients.model_calls == -(-N // micro_batch)


class Snapshot:
    """Everything about a model that must not change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modes = [module.training for module in model.modules()]
        self.tensors = {name: (id(value), value._version) for name, value in self.named()}
        self.values = {name: value.detach().clone() for name, value in self.named()}
        self.requires_grad = [parameter.requires_grad for parameter in model.parameters()]
        self.grads = [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()]

    def named(self):
        return [*self.model.named_parameters(), *self.model.named_buffers()]

    def check(self) -> None:
        assert [module.training for module in self.model.modules()] == self.modes
        assert {name: (id(value), value._version) for name, value in self.named()} == self.tensors
        assert all(torch.equal(value, self.values[name]) for name, value in self.named())
        assert [parameter.requires_grad for parameter in self.model.parameters()] == self.requires_grad
        for parameter, before in zip(self.model.parameters(), self.grads, strict=True):
            assert (parameter.grad is None) == (before is None)
            if before is not None:
                assert id(parameter.grad) == before[0]
                assert torch.equal(parameter.grad, before[1])


def awkward_model(name: str = "normed") -> nn.Module:
    """Mixed modes, a frozen weight, a gradient on one parameter."""
    model = zoo.make_model(name)
    model.dropout.eval()
    model.hidden.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    return model


@pytest.mark.parametrize("state", [None, "other"])
def test_the_model_is_left_as_found(state):
    model = awkward_model()
    before, rng = Snapshot(model), torch.random.get_rng_state()
    other = None if state is None else zoo.make_model("normed", seed=5).state_dict()
    PerSampleGradients(model, margin, micro_batch=2)(other, zoo.make_samples("normed", N))
    before.check()
    assert torch.equal(torch.random.get_rng_state(), rng)


def test_the_model_is_left_as_found_after_an_exception_in_the_middle():
    class Fails(zoo.Normed):
        calls = 0

        def forward(self, x):
            out = super().forward(x)
            Fails.calls += 1
            if Fails.calls == 3:
                raise ArithmeticError("third call")
            return out

    model = Fails()
    model.dropout.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = Snapshot(model)
    gradients = PerSampleGradients(model, margin, micro_batch=2)
    with pytest.raises(ArithmeticError, match="third call"):
        gradients(zoo.make_model("normed", seed=5).state_dict(), zoo.make_samples("normed", N))
    before.check()
    assert Fails.calls == 3


def test_buffers_that_the_forward_pass_changes_stay():
    class Counting(zoo.MLP):
        def __init__(self):
            super().__init__()
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, x):
            self.passes += 1
            return super().forward(x)

    model = Counting()
    before = Snapshot(model)
    PerSampleGradients(model, margin, micro_batch=2)(None, zoo.make_samples("mlp", N))
    before.check()


@pytest.mark.parametrize("name", ["mlp", "normed", "tied"])
def test_a_checkpoint_replaces_weights_and_buffers(name):
    other = zoo.make_model(name, seed=7)
    samples = zoo.make_samples(name, N)
    expected, _ = PerSampleGradients(other, margin)(None, samples)
    rows, _ = PerSampleGradients(zoo.make_model(name), margin)(other.state_dict(), samples)
    torch.testing.assert_close(rows, expected, atol=0, rtol=0)


def test_tied_checkpoints_may_hold_either_name_but_not_two_values():
    other = zoo.make_model("tied", seed=7)
    samples = zoo.make_samples("tied", N)
    gradients = PerSampleGradients(zoo.make_model("tied"), margin)
    expected, _ = gradients(other.state_dict(), samples)
    for dropped in ("head.weight", "embed.weight"):
        state = {key: value for key, value in other.state_dict().items() if key != dropped}
        torch.testing.assert_close(gradients(state, samples)[0], expected, atol=0, rtol=0)
    torn = {key: value.clone() for key, value in other.state_dict().items()}
    torn["head.weight"] += 1
    with pytest.raises(UsageError, match="tied weights"):
        gradients(torn, samples)


def test_checkpoints_that_do_not_fit_are_named():
    gradients = PerSampleGradients(zoo.make_model("mlp"), margin)
    samples = zoo.make_samples("mlp", 2)
    state = zoo.make_model("mlp").state_dict()
    with pytest.raises(UsageError, match=r"missing \['head.bias'\]"):
        gradients({key: value for key, value in state.items() if key != "head.bias"}, samples)
    with pytest.raises(UsageError, match=r"not in the model \['tail'\]"):
        gradients({**state, "tail": torch.zeros(1)}, samples)
    with pytest.raises(UsageError, match=r"'head.bias' has shape \(4,\), expected \(3,\)"):
        gradients({**state, "head.bias": torch.zeros(4)}, samples)


def test_checkpoints_are_read_from_safetensors_only(tmp_path):
    state = zoo.make_model("normed", seed=3).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    found = load_checkpoint(tmp_path / "a.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert checkpoint_shapes(str(tmp_path / "a.safetensors")) == {key: tuple(v.shape) for key, v in state.items()}
    torch.save(state, tmp_path / "a.pt")
    for path in (tmp_path / "a.pt", tmp_path / "none.safetensors"):
        with pytest.raises(UsageError, match="cannot be read as safetensors"):
            load_checkpoint(path)


def test_samples_with_a_gradient_that_is_not_finite_are_named():
    x, y = zoo.make_samples("mlp", N)
    x[4, 0] = torch.nan
    x[7, 0] = torch.inf
    gradients = PerSampleGradients(zoo.make_model("mlp"), margin)
    with pytest.raises(GrassError, match=r"2 sample\(s\) is not finite, at position\(s\) 104, 107;"):
        gradients(None, (x, y), first=100)


def test_large_but_finite_gradients_pass_although_their_sum_overflows():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return x @ self.weight

    rows, _ = PerSampleGradients(Steep(), lambda model, batch: model(batch[0]))(None, (torch.full((2, 4), 3e38),))
    assert torch.equal(rows, torch.full((2, 4), 3e38))


def test_rows_are_written_where_asked():
    samples = zoo.make_samples("mlp", N)
    gradients = PerSampleGradients(zoo.make_model("mlp"), margin)
    expected, _ = gradients(None, samples)
    buffer = torch.full((N + 4, gradients.p), 7.0)
    rows, _ = gradients(None, samples, out=buffer[2 : N + 2])
    assert rows.data_ptr() == buffer[2].data_ptr()
    assert torch.equal(buffer[2 : N + 2], expected)
    assert bool((buffer[:2] == 7).all())
    assert bool((buffer[N + 2 :] == 7).all())
    with pytest.raises(UsageError, match="out is"):
        gradients(None, samples, out=buffer)


def test_low_precision_models_give_float32_rows():
    samples = zoo.make_samples("mlp", N, dtype=torch.bfloat16)
    rows, values = PerSampleGradients(zoo.make_model("mlp", dtype=torch.bfloat16), margin)(None, samples)
    assert rows.dtype == values.dtype == torch.float32
    expected, _ = PerSampleGradients(zoo.make_model("mlp"), margin)(None, (samples[0].float(), samples[1]))
    torch.testing.assert_close(rows, expected, atol=0.05, rtol=0.05)


def test_empty_batches_are_fine():
    rows, values = PerSampleGradients(zoo.make_model("mlp"), margin)(None, zoo.make_samples("mlp", 0))
    assert rows.shape[0] == values.shape[0] == 0


def test_values_without_a_gradient_are_refused_but_not_for_some_weights_alone():
    samples = zoo.make_samples("unused", N)
    for output in (
        lambda model, batch: margin(model, batch).detach(),
        lambda model, batch: torch.zeros(len(batch[1])),
        torch.no_grad()(lambda model, batch: margin(model, batch)),
    ):
        with pytest.raises(
            UsageError, match=r"<lambda> have no gradient with respect to any trainable weight of Unused"
        ):
            PerSampleGradients(zoo.make_model("unused"), output)(None, samples)
    spare = PerSampleGradients(zoo.make_model("unused"), margin, parameters=lambda name, _: name.startswith("spare"))
    assert torch.count_nonzero(spare(None, samples)[0]) == 0

    def ignoring(model, batch):
        return torch.where(batch[1] == 0, 0, margin(model, batch))

    rows, _ = PerSampleGradients(zoo.make_model("unused"), ignoring)(None, (samples[0], torch.zeros_like(samples[1])))
    assert torch.count_nonzero(rows) == 0


class Lookup(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4, **options), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.table(ids).sum(dim=1))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparse": True}, r"layer 'table' with sparse=True gives sparse gradients.*Set sparse of the layer to False"),
        (
            {"max_norm": 0.5},
            r"layer 'table' with max_norm=0\.5 rescales its weights.*set max_norm of the layer to None",
        ),
    ],
)
def test_embeddings_that_vmap_cannot_serve_are_named(options, message):
    batch = torch.randint(0, 9, (5, 4)), torch.randint(0, 3, (5,))
    with pytest.raises(UsageError, match=message) as caught:
        PerSampleGradients(Lookup(**options), margin)(None, batch)
    assert "mask" not in str(caught.value)


@pytest.mark.parametrize("read", [lambda value: value.item(), lambda value: value.tolist(), bool])
def test_an_output_that_reads_values_is_refused_in_clear_words(read):
    def output(model, batch):
        return margin(model, batch) * (1 + read(batch[0].max()))

    with pytest.raises(UsageError, match=r"MLP or its output looks at the values of a tensor \(\.item\(\)"):
        PerSampleGradients(zoo.make_model("mlp"), output)(None, zoo.make_samples("mlp", N))


def test_bad_arguments_are_refused():
    model = zoo.make_model("mlp")
    samples = zoo.make_samples("mlp", 4)
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(UsageError, match="none of them is left"):
        PerSampleGradients(frozen, margin)
    with pytest.raises(UsageError, match="micro_batch is 0"):
        PerSampleGradients(model, margin, micro_batch=0)
    with pytest.raises(UsageError, match="float16"):
        PerSampleGradients(model, margin, dtype=torch.float16)
    with pytest.raises(UsageError, match=r"expected a torch\.nn\.Module"):
        PerSampleGradients(lambda x: x, margin)
    gradients = PerSampleGradients(model, margin)
    with pytest.raises(UsageError, match="A batch is a Tensor"):
        gradients(None, samples[0])
    with pytest.raises(UsageError, match="lengths"):
        gradients(None, (samples[0], samples[1][:2]))
    with pytest.raises(UsageError, match="Element 1 of a batch is a list"):
        gradients(None, (samples[0], [1, 2, 3, 4]))
    averaged = PerSampleGradients(model, lambda used, batch: margin(used, batch).mean())
    with pytest.raises(UsageError, match="one value per sample"):
        averaged(None, samples)

"""Recording of masked passes on a CPU: a graph that repeats the step stands for a CUDA graph."""

import logging
from contextlib import contextmanager

import pytest
import torch
import zoo
from torch import nn

from grass_lib.errors import GrassError
from grass_lib.gradients import MaskedGradients, PerSampleGradients, cross_entropy, margin, masked_graph
from grass_lib.gradients.masked_graph import Recordings, Shared, StaticState
from grass_lib.gradients.masked_pass import RowWriter
from grass_lib.gradients.state import ModelState, copy_onto

CPU = torch.device("cpu")


class Graphs:
    """Stands for CUDA graphs: recording computes nothing, replaying repeats the step on the tensors it was given."""

    def __init__(self, fails: Exception | None = None, waits: tuple[str, ...] = (), off: float = 0.0) -> None:
        self.fails, self.waits, self.off = fails, list(waits), off
        self.recorded = self.replayed = 0

    def capture(self, device):
        def record(step):
            if self.fails is not None:
                raise self.fails
            self.recorded += 1

            def replay():
                self.replayed += 1
                step()
                self.rows(step).add_(self.off)

            return replay

        return record

    @staticmethod
    def rows(step):
        return dict(zip(step.__code__.co_freevars, step.__closure__, strict=True))["own_rows"].cell_contents

    @contextmanager
    def noticing(self):
        yield self.waits

    def recordings(self) -> Recordings:
        return Recordings(CPU, Shared(), self.capture, self.noticing)


def recording(model, output, indices, graphs, **options):
    gradients = MaskedGradients(model, output, indices, **options)
    assert gradients._recordings is None  # a CPU records nothing by itself
    gradients._recordings = graphs.recordings()
    return gradients


def text_output(model, batch):
    ids = batch[0]
    return model(ids).log_softmax(dim=2)[:, :-1].gather(2, ids[:, 1:, None]).sum(dim=(1, 2))


def some(p: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(p, generator=torch.Generator().manual_seed(seed))[:k].sort().values


def rows_of(model, batch, indices, output=margin):
    return PerSampleGradients(model, output)(None, batch)[0][:, indices]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("name", sorted(zoo.MODELS | zoo.LAYERED))
def test_the_third_batch_of_a_shape_is_replayed(name, share):
    output = text_output if name == "text" else margin
    model, graphs = zoo.make_model(name), Graphs()
    p = PerSampleGradients(model, output).p
    indices = some(p, int(share * p))
    gradients = recording(model, output, indices, graphs)
    for turn in range(5):
        batch = zoo.make_batch(name, zoo.make_samples(name, 6, seed=turn))
        rows, values = gradients(None, batch)
        full, wanted = PerSampleGradients(model, output)(None, batch)
        close(rows, full[:, indices])
        close(values, wanted)
        assert (graphs.recorded, graphs.replayed) == ((0, 0) if turn == 0 else (1, turn))
    assert gradients.model_calls == 5


def test_checkpoints_in_turn_and_weights_changed_in_place():
    model, other = zoo.make_model("image"), zoo.make_model("image", seed=7)
    batch, indices, graphs = zoo.make_samples("image", 6), some(200, 60), Graphs()
    gradients = recording(model, margin, indices, graphs)
    bound = gradients.bind(other.state_dict())
    for turn in range(3):
        close(gradients(None, batch)[0], rows_of(model, batch, indices))
        close(gradients(bound, batch)[0], rows_of(other, batch, indices))
        close(gradients(other.state_dict(), batch)[0], rows_of(other, batch, indices))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1 + turn)
    assert graphs.recorded == 1
    assert graphs.replayed == 8
    close(gradients(bound, batch)[0], rows_of(other, batch, indices))
    for values in (bound.trainable, bound.buffers):
        for value in values.values():
            value.data.mul_(2)  # leaves no trace in the version of the tensor
    doubled = MaskedGradients(model, margin, indices)(bound, batch)[0]
    close(gradients(bound, batch)[0], doubled)
    assert not torch.allclose(doubled, rows_of(other, batch, indices))


def test_running_moments_of_a_checkpoint_are_used_and_never_changed():
    model = zoo.make_model("normed")
    batch, graphs = zoo.make_samples("normed", 6), Graphs()
    indices = some(PerSampleGradients(model, margin).p, 30)
    gradients = recording(model, margin, indices, graphs)
    states = [zoo.make_model("normed", seed=seed) for seed in (3, 4)]
    for state in states:
        nn.init.uniform_(state.norm.running_var, 0.5, 2.0)
        state.norm.running_mean.add_(0.3)
    for _ in range(2):
        for state in states:
            before = {name: value.clone() for name, value in state.state_dict().items()}
            close(gradients(state.state_dict(), batch)[0], rows_of(state, batch, indices))
            assert all(torch.equal(value, before[name]) for name, value in state.state_dict().items())
    assert graphs.replayed == 3


def test_the_last_small_batch_runs_as_it_is_until_it_recurs():
    model, graphs, indices = zoo.make_model("image"), Graphs(), some(200, 50)
    gradients = recording(model, margin, indices, graphs, micro_batch=4)
    counts = []
    for turn in range(3):
        samples = zoo.make_samples("image", 10, seed=turn)
        close(gradients(None, samples)[0], rows_of(model, samples, indices))
        counts.append((graphs.recorded, graphs.replayed))
    # Micro-batches of 4, 4 and 2: the second 4 is recorded and replayed for comparison, later ones are replayed.
    assert counts == [(1, 1), (2, 4), (2, 7)]
    assert gradients.model_calls == 9


def test_a_batch_of_one_waits_for_the_checks_of_a_larger_one():
    model, graphs, indices = zoo.make_model("image"), Graphs(), some(200, 50)
    gradients = recording(model, margin, indices, graphs)
    one, several = zoo.make_samples("image", 1), zoo.make_samples("image", 5)
    for batch in (one, several, several, one, one, several):
        close(gradients(None, batch)[0], rows_of(model, batch, indices))
    assert (graphs.recorded, graphs.replayed) == (2, 4)


def test_batches_without_gradients_wait_for_the_checks_of_another_one():
    model, graphs, indices = zoo.make_model("image"), Graphs(), some(200, 50)
    gradients = recording(model, cross_entropy, indices, graphs)
    x, y = zoo.make_samples("image", 5)
    for labels, replayed in ((y * 0 - 100, 0), (y * 0 - 100, 0), (y, 0), (y, 1), (y, 2)):
        close(gradients(None, (x, labels))[0], rows_of(model, (x, labels), indices, cross_entropy))
        assert graphs.replayed == replayed


def test_other_coordinates_have_recordings_of_their_own():
    model, other = zoo.make_model("image"), zoo.make_model("image", seed=5)
    batch, graphs = zoo.make_samples("image", 6), Graphs()
    masks = [some(200, k, seed) for seed, k in enumerate((20, 90))]
    gradients = recording(model, margin, masks[0], graphs)
    gradients(None, batch)
    siblings = [gradients, gradients.keeping(masks[1])]
    for _ in range(3):
        for one, mask in zip(siblings, masks, strict=True):
            for state in (model, other):
                close(one(state.state_dict(), batch)[0], rows_of(state, batch, mask))
    assert graphs.recorded == 2
    assert siblings[0]._recordings.shared.static is siblings[1]._recordings.shared.static
    assert [one.recorded for one in (*siblings, gradients.keeping(masks[0]))] == [1, 1, 0]


def test_settings_that_choose_kernels_belong_to_the_shape():
    model, graphs, indices = zoo.make_model("mlp"), Graphs(), some(50, 20)
    batch = zoo.make_samples("mlp", 6)
    gradients = recording(model, margin, indices, graphs)

    def recorded_after_three() -> int:
        for _ in range(3):
            gradients(None, batch)
        return graphs.recorded

    assert recorded_after_three() == 1
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = not before
        assert recorded_after_three() == 2
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert recorded_after_three() == 2
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if precision == "highest" else "highest")
        assert recorded_after_three() == 3
    finally:
        torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(True)
    try:
        assert recorded_after_three() == 4
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("graphs", "reason"),
    [
        (Graphs(fails=GrassError("operation not permitted")), "operation not permitted"),
        (Graphs(fails=RuntimeError("out of memory")), "out of memory"),
        (Graphs(waits=("model.py:7",)), "waits for the device, at model.py:7"),
        (Graphs(off=0.5), "other numbers"),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is_and_is_named_once(graphs, reason, caplog):
    model, indices = zoo.make_model("image"), some(200, 50)
    gradients = recording(model, margin, indices, graphs)
    with caplog.at_level(logging.WARNING, logger="grass_lib"):
        for turn in range(4):
            samples = zoo.make_samples("image", 6 + turn // 3, seed=turn)
            close(gradients(None, samples)[0], rows_of(model, samples, indices))
            close(gradients.keeping(indices)(None, samples)[0], rows_of(model, samples, indices))
    (warning,) = [record for record in caplog.records if "CUDA graph" in record.getMessage()]
    assert reason in warning.getMessage()
    assert graphs.replayed <= 1
    assert gradients._recordings.shared.static is None


@pytest.mark.parametrize("compared", [1, 70, 1 << 18])
def test_a_difference_in_one_row_is_seen_however_rows_are_compared(compared, monkeypatch):
    monkeypatch.setattr(masked_graph, "_COMPARED", compared)
    wanted = torch.randn(6, 50)
    found = wanted.clone()
    wanted[2, 3] = found[2, 3] = torch.nan
    assert masked_graph._same(found, wanted)
    found[5, 7] += 0.1
    assert not masked_graph._same(found, wanted)


def test_under_deterministic_algorithms_a_replay_gives_the_same_bits():
    graphs = Graphs(off=1e-6)
    gradients = recording(zoo.make_model("image"), margin, some(200, 50), graphs)
    samples = zoo.make_samples("image", 6)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            gradients(None, samples)
    finally:
        torch.use_deterministic_algorithms(False)
    assert "other numbers" in gradients._recordings.shared.refused


def test_nothing_is_recorded_where_a_parameter_goes_the_general_way():
    class Scaled(zoo.MLP):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(zoo.FEATURES))

        def forward(self, x):
            return super().forward(self.scale * x)

    torch.manual_seed(0)
    model, graphs = Scaled(), Graphs()
    p = PerSampleGradients(model, margin).p
    gradients, samples = recording(model, margin, torch.arange(p), graphs), zoo.make_samples("mlp", 6)
    for _ in range(3):
        close(gradients(None, samples)[0], rows_of(model, samples, torch.arange(p)))
    assert graphs.recorded == 0
    # Coordinates of other layers alone can be recorded.
    others = gradients.keeping(torch.arange(zoo.FEATURES, p))
    for _ in range(3):
        close(others(None, samples)[0], rows_of(model, samples, torch.arange(zoo.FEATURES, p)))
    assert graphs.recorded == 1


def test_what_a_later_shape_shows_about_the_model_counts():
    class Summed(zoo.MLP):
        def forward(self, x):
            if len(x) == 4:  # one of the layers then sees no samples on dimension 0
                return self.head(torch.tanh(self.hidden(x.T.contiguous().T[None])[0]))
            return super().forward(x)

    torch.manual_seed(0)
    model, graphs = Summed(), Graphs()
    indices = some(PerSampleGradients(model, margin).p, 30)
    gradients = recording(model, margin, indices, graphs)
    for n in (6, 6, 6, 4, 4, 6, 6):
        samples = zoo.make_samples("mlp", n, seed=n)
        close(gradients(None, samples)[0], rows_of(model, samples, indices))
    assert graphs.recorded == 1
    assert gradients.recorded == 0
    assert "general" in gradients.routes.values()


def test_at_most_four_shapes_are_recorded():
    model, graphs, indices = zoo.make_model("mlp"), Graphs(), some(50, 20)
    gradients = recording(model, margin, indices, graphs)
    for n in [*range(2, 9)] * 3:
        samples = zoo.make_samples("mlp", n, seed=n)
        close(gradients(None, samples)[0], rows_of(model, samples, indices))
    assert graphs.recorded == 4


def test_weights_of_another_type_are_recorded_anew():
    model, graphs, indices = zoo.make_model("mlp"), Graphs(), some(50, 20)
    samples = zoo.make_samples("mlp", 6)
    wide = tuple(value.double() if value.is_floating_point() else value for value in samples)
    gradients = recording(model, margin, indices, graphs)
    bound = gradients.bind()
    double = ModelState({name: value.double() for name, value in bound.trainable.items()}, {}, {})
    wanted = rows_of(model, samples, indices)
    for _ in range(3):
        close(gradients(bound, samples)[0], wanted)
    first = gradients._recordings.shared.static
    for _ in range(3):
        close(gradients(double, wide)[0], wanted)
        close(gradients(bound, samples)[0], wanted)
    assert first is not gradients._recordings.shared.static


def test_rows_and_inputs_of_callers_are_their_own():
    model, graphs, indices = zoo.make_model("image"), Graphs(), some(200, 50)
    gradients = recording(model, margin, indices, graphs)
    samples, buffer = zoo.make_samples("image", 6), torch.full((8, 50), 7.0)
    kept = [value.clone() for value in samples]
    found = [gradients(None, samples)[0] for _ in range(4)]
    gradients(None, samples, out=buffer[1:7])
    assert len({rows.data_ptr() for rows in found}) == 4
    assert bool((buffer[[0, 7]] == 7).all())
    close(buffer[1:7], rows_of(model, samples, indices))
    assert all(torch.equal(value, before) for value, before in zip(samples, kept, strict=True))


def test_a_sample_that_is_not_finite_is_named_by_a_replay_too():
    gradients = recording(zoo.make_model("mlp"), margin, some(50, 10), graphs := Graphs())
    x, y = zoo.make_samples("mlp", 6)
    for _ in range(3):
        gradients(None, (x, y))
    assert graphs.replayed == 2
    broken = x.clone()
    broken[4, 0] = torch.nan
    with pytest.raises(GrassError, match=r"position\(s\) 104;"):
        gradients(None, (broken, y), first=100)


def test_layers_in_the_order_of_the_columns_are_joined_and_others_added():
    for name, joined in (("image", True), ("tied", False)):
        model = zoo.make_model(name)
        p = PerSampleGradients(model, margin).p
        gradients = MaskedGradients(model, margin, torch.arange(p))
        assert gradients._write._joins is joined
    layers = MaskedGradients(zoo.make_model("image"), margin, some(200, 40))._layers
    made = {name: torch.randn(3, layer.size) for name, layer in layers.items()}
    made[next(iter(made))] = None  # a layer that the pass did not use
    whole, added = torch.full((3, 40), 7.0), torch.full((3, 45), 7.0)
    RowWriter(layers, 40)(made, whole)
    RowWriter(layers, 45)(made, added)
    assert torch.equal(whole, added[:, :40])
    assert bool((added[:, 40:] == 0).all())


def test_static_states_and_copies_of_mixed_types():
    state = ModelState({"w": torch.ones(2, 3)}, {"f": torch.ones(2).half()}, {"count": torch.tensor(4)})
    static = StaticState(state)
    other = ModelState({"w": torch.rand(3, 2).T}, {"f": torch.zeros(2).half()}, {"count": torch.tensor(9)})
    assert static.fits(other)
    static.load(other)
    assert torch.equal(static.state.trainable["w"], other.trainable["w"])
    assert int(static.state.buffers["count"]) == 9
    assert int(state.buffers["count"]) == 4
    assert not static.fits(ModelState({"w": torch.ones(2, 3).double()}, other.fixed, other.buffers))
    assert not static.fits(ModelState({"w": torch.ones(3, 2)}, other.fixed, other.buffers))
    copy_onto([], [])
    with pytest.raises(ValueError, match="shorter"):
        copy_onto([torch.ones(1)], [])

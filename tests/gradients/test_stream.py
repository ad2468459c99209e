import pytest
import torch
import zoo

from grass_lib.errors import GrassError, UsageError
from grass_lib.gradients import PassTimings, PerSampleGradients, margin, project_loader
from grass_lib.projection import build_projector
from grass_lib.specs import CompressionSpec

N = 22


def projectors(p: int, *texts: str):
    return {text: build_projector(CompressionSpec.parse(text), p) for text in texts}


def rows_of(samples):
    return PerSampleGradients(zoo.make_model("mlp"), margin)(None, samples)


def test_features_are_the_projected_gradients_in_order():
    samples = zoo.make_samples("mlp", N)
    gradients = PerSampleGradients(zoo.make_model("mlp"), margin)
    chosen = projectors(gradients.p, "identity", "normal-7", "sjlt-5")
    features, values = project_loader(gradients, None, zoo.make_loader(samples), chosen)
    rows, expected = rows_of(samples)
    torch.testing.assert_close(values, expected)
    assert list(features) == ["identity", "normal-7", "sjlt-5"]
    for name, projector in chosen.items():
        torch.testing.assert_close(features[name], projector(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 5, N])
@pytest.mark.parametrize("held", [1, 3, 7, 1000])
def test_buffer_and_batch_size_change_nothing(batch_size, held):
    samples = zoo.make_samples("mlp", N)
    gradients = PerSampleGradients(zoo.make_model("mlp"), margin)
    chosen = projectors(gradients.p, "identity", "normal-7")
    features, values = project_loader(
        gradients, None, zoo.make_loader(samples, batch_size), chosen, buffer_bytes=held * gradients.p * 4
    )
    rows, expected = rows_of(samples)
    torch.testing.assert_close(values, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(features["identity"], rows, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(features["normal-7"], chosen["normal-7"](rows), atol=1e-5, rtol=1e-5)


class Recorder:
    """Stands in for a projector and notes how many rows it is given."""

    k = 1

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[int] = []

    def __call__(self, rows):
        self.calls.append(len(rows))
        return rows.sum(dim=1, keepdim=True)


def test_rows_are_collected_up_to_the_budget_and_no_further():
    gradients = PerSampleGradients(zoo.make_model("mlp"), margin)
    recorder = Recorder()
    loader = zoo.make_loader(zoo.make_samples("mlp", N), 4)
    project_loader(gradients, None, loader, {"r": recorder}, buffer_bytes=10 * gradients.p * 4)
    assert recorder.calls == [8, 8, 6]
    assert gradients.model_calls == 6
    recorder = Recorder()
    project_loader(gradients, None, loader, {"r": recorder}, buffer_bytes=1)
    assert recorder.calls == [1] * N


def test_one_gradient_pass_serves_every_projector():
    gradients = PerSampleGradients(zoo.make_model("mlp"), margin)
    chosen = projectors(gradients.p, *(f"normal-{k}" for k in range(2, 12)))
    project_loader(gradients, None, zoo.make_loader(zoo.make_samples("mlp", N), 4), chosen)
    assert gradients.model_calls == 6


def test_dict_batches_and_unsized_loaders_stream_too():
    samples = zoo.make_samples("named", N)
    gradients = PerSampleGradients(zoo.make_model("named"), margin)
    whole, _ = gradients(None, zoo.make_batch("named", samples))
    features, _ = project_loader(
        gradients,
        None,
        iter(zoo.make_loader(samples, 4, "named")),
        projectors(gradients.p, "identity"),
        buffer_bytes=5000,
    )
    torch.testing.assert_close(features["identity"], whole, atol=1e-6, rtol=1e-5)


def test_timings_name_every_projector():
    gradients = PerSampleGradients(zoo.make_model("mlp"), margin)
    timings = PassTimings()
    chosen = projectors(gradients.p, "normal-7", "identity")
    project_loader(gradients, None, zoo.make_loader(zoo.make_samples("mlp", N)), chosen, timings=timings)
    assert timings.gradients > 0
    assert set(timings.projection) == {"normal-7", "identity"}
    assert all(seconds > 0 for seconds in timings.projection.values())


def test_position_in_the_data_set_is_named_and_the_model_restored():
    x, y = zoo.make_samples("mlp", N)
    x[13] = torch.nan
    model = zoo.make_model("mlp")
    gradients = PerSampleGradients(model, margin, micro_batch=2)
    with pytest.raises(GrassError, match=r"position\(s\) 13;"):
        project_loader(gradients, None, zoo.make_loader((x, y)), projectors(gradients.p, "sjlt-5"))
    assert all(module.training for module in model.modules())


def test_empty_loaders_and_budgets_are_refused():
    gradients = PerSampleGradients(zoo.make_model("mlp"), margin)
    with pytest.raises(UsageError, match="no samples"):
        project_loader(gradients, None, [], projectors(gradients.p, "sjlt-5"))
    with pytest.raises(UsageError, match="buffer_bytes is 0"):
        project_loader(gradients, None, [], projectors(gradients.p, "sjlt-5"), buffer_bytes=0)


def test_short_walks_show_no_bar_and_long_ones_do(capfd, monkeypatch):
    gradients = PerSampleGradients(zoo.make_model("mlp"), margin)
    loader, chosen = zoo.make_loader(zoo.make_samples("mlp", N)), projectors(gradients.p, "sjlt-5")
    project_loader(gradients, None, loader, chosen)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr("grass_lib.gradients.stream._BAR_DELAY_SECONDS", 0.0)
    project_loader(gradients, None, loader, chosen)
    assert f"/{N}" in capfd.readouterr().err
    project_loader(gradients, None, loader, chosen, progress=False)
    assert capfd.readouterr().err == ""

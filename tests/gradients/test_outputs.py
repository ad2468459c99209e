import functools

import pytest
import torch
import zoo
from torch import nn

from grass_lib import TRAK, InfluenceFunction, TracIn
from grass_lib.errors import GrassError, UsageError
from grass_lib.gradients import MaskedGradients, PerSampleGradients, causal_loss, cross_entropy, margin, margin_weight
from grass_lib.gradients.outputs import check_output
from grass_lib.masks.layer_samples import collect


def test_margin_is_the_log_odds_of_the_right_class():
    logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    p = logits.softmax(dim=1)[torch.arange(7), labels]
    found = margin(lambda x: x, (logits, labels))
    torch.testing.assert_close(found, torch.log(p / (1 - p)))
    torch.testing.assert_close(margin_weight(found), 1 - p)


def test_margin_and_its_gradient_stay_finite_where_the_probability_rounds_to_one_or_zero():
    logits = torch.tensor([[200.0, 0.0, -5.0], [-200.0, 0.0, -5.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    assert logits.softmax(dim=1)[0, 0] == 1.0
    found = margin(lambda x: x, (logits, labels))
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    others = torch.logsumexp(torch.tensor([0.0, -5.0]), dim=0)
    torch.testing.assert_close(found.detach(), torch.tensor([200.0, -200.0]) - others)
    torch.testing.assert_close(gradient[:, 0], torch.ones(2))
    torch.testing.assert_close(gradient.sum(dim=1), torch.zeros(2), atol=1e-6, rtol=0)
    # 1 - p would round to 0 here.
    torch.testing.assert_close(margin_weight(torch.tensor([50.0])), torch.tensor([-50.0]).exp())


def test_cross_entropy_is_not_averaged():
    x, labels = zoo.make_samples("mlp", 5)
    model = zoo.make_model("mlp").eval()
    expected = -model(x).log_softmax(dim=1)[torch.arange(5), labels]
    torch.testing.assert_close(cross_entropy(model, (x, labels)), expected)


def test_dict_batches_go_in_by_name():
    samples = zoo.make_samples("named", 5)
    model = zoo.make_model("named").eval()
    batch = zoo.make_batch("named", samples)
    expected = margin(lambda x: x, (model(samples[0], samples[1]), samples[2]))
    torch.testing.assert_close(margin(model, batch), expected)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(3, 2, 2), torch.zeros(3, dtype=torch.long), r"shape \(3, 2, 2\)"),
        (torch.zeros(3, 2), torch.zeros(3), "torch.float32"),
        (torch.zeros(3, 2), torch.zeros(3, 1, dtype=torch.long), r"\(3, 1\)"),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), "at least 2 classes"),
    ],
)
def test_what_does_not_fit_is_named(logits, labels, message):
    with pytest.raises(UsageError, match=message):
        margin(lambda x: x, (logits, labels))


@pytest.mark.parametrize("label", [3, 7, -1, -100])
def test_a_label_that_is_no_class_is_refused_also_under_vmap(label):
    logits, labels = torch.zeros(4, 3), torch.tensor([0, 2, label, 1])
    message = rf"{label} is out of bounds.*expected class numbers from 0 to 2.*-100 neither"
    with pytest.raises(UsageError, match=message):
        margin(lambda x: x, (logits, labels))
    samples = (zoo.make_samples("mlp", 4)[0], labels)
    with pytest.raises(UsageError, match=message):
        PerSampleGradients(zoo.make_model("mlp"), margin)(None, samples)
    with pytest.raises(UsageError, match=message):
        MaskedGradients(zoo.make_model("mlp"), margin, torch.arange(9))(None, samples)


@pytest.mark.parametrize("gradients", [PerSampleGradients, lambda *given: MaskedGradients(*given, torch.arange(9))])
@pytest.mark.parametrize("label", [7, -100])
def test_a_label_that_cannot_be_looked_at_makes_its_sample_nan(label, gradients, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 2, label, 1])
    found = margin(lambda x: x, (logits, labels))
    assert found.isnan().tolist() == [False, False, True, False]
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.isnan().all(dim=1).tolist() == gradient.isnan().any(dim=1).tolist() == [False, False, True, False]
    with pytest.raises(GrassError, match=r"1 sample\(s\) is not finite, at position\(s\) 2"):
        gradients(zoo.make_model("mlp"), margin)(None, (zoo.make_samples("mlp", 4)[0], labels))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_margin_keeps_the_type_of_the_logits(dtype):
    assert margin(lambda x: x, (torch.zeros(2, 3, dtype=dtype), torch.tensor([0, 1]))).dtype == dtype


@pytest.mark.parametrize(
    ("output", "seen"),
    [
        (None, "None"),
        ("margin", "'margin'"),
        (nn.CrossEntropyLoss(), "CrossEntropyLoss, which takes predictions and labels"),
        (nn.MSELoss, "MSELoss, which takes"),
        (type("Own", (nn.NLLLoss,), {})(), "Own, which takes"),
        (nn.functional.cross_entropy, "cross_entropy, which takes"),
    ],
)
def test_losses_of_another_form_are_refused_where_they_are_given(output, seen):
    model = zoo.make_model("mlp")
    form = r".*expected a function {}\(model, batch\) -> \(batch,\).*grass_lib\.gradients\.cross_entropy"
    calls = {
        "output": [
            lambda: PerSampleGradients(model, output),
            lambda: MaskedGradients(model, output, torch.arange(3)),
            lambda: TRAK(model, [model.state_dict()], output=output),
            lambda: TracIn(model, [model.state_dict()], output=output),
        ],
        "loss": [lambda: InfluenceFunction(model, output), lambda: collect(model, output, [])],
        "target": [lambda: InfluenceFunction(model, cross_entropy, target=output or "none")],
    }
    for name, places in calls.items():
        for place in places:
            shown = "'none'" if name == "target" and output is None else seen
            with pytest.raises(UsageError, match=f"{name} is {shown}{form.format(name)}"):
                place()


def test_any_other_callable_is_taken():
    class Module(nn.Module):
        def forward(self, model, batch):
            return cross_entropy(model, batch)

    class Own(torch.nn.CrossEntropyLoss):
        def forward(self, model, batch):
            return cross_entropy(model, batch)

    @functools.wraps(torch.nn.functional.cross_entropy)
    def wrapped(model, batch):
        return cross_entropy(model, batch)

    partial = functools.partial(causal_loss, reduction="mean")
    for output in (margin, Module(), Own(), wrapped, partial, lambda model, batch: None):
        check_output(output)


def test_batches_without_labels_are_refused():
    with pytest.raises(UsageError, match="'labels'"):
        margin(lambda x: x, {"x": torch.zeros(2, 2)})
    with pytest.raises(UsageError, match="1 element"):
        margin(lambda x: x, (torch.zeros(2, 2),))

import pytest
import torch
import zoo

from grass_lib.errors import UsageError
from grass_lib.gradients import cross_entropy, margin, margin_weight


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


def test_batches_without_labels_are_refused():
    with pytest.raises(UsageError, match="'labels'"):
        margin(lambda x: x, {"x": torch.zeros(2, 2)})
    with pytest.raises(UsageError, match="1 element"):
        margin(lambda x: x, (torch.zeros(2, 2),))

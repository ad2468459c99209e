from grass_lib.report.sides import sides_sentence


def row(measured, published, *, mask=False, **more):
    found = {
        "experiment": "pair", "metric": "lds", "measured": measured, "published": published, "verdict": "differs",
        "sparsification": "identity", "projection": "random_mask-4" if mask else "sjlt-2",
    }  # fmt: skip
    return found | more


def test_masks_and_whole_gradients_are_counted_apart():
    rows = [
        row(0.2, 0.1, mask=True),
        row(0.1, 0.2, mask=True),
        row(0.25, 0.3),
        row(0.5, 0.1, sparsification="random_mask-4"),
    ]
    rows += [row(None, 0.3), row(0.9, 0.1, verdict="not comparable"), row(0.9, 0.1, metric="projection_seconds")]
    text = sides_sentence([*rows, row(0.9, 0.1, experiment="other")], "pair")
    assert text == (
        "Of 2 masks, 1 are above the published value and 1 below (+0.000 on average); of 1 masks with a projection "
        "behind them, 1 are above the published value and 0 below (+0.400 on average); of 1 projections of the whole "
        "gradient, 0 are above the published value and 1 below (-0.050 on average).\n"
    )


def test_nothing_measured():
    assert sides_sentence([row(None, 0.1)], "pair") == "Nothing is measured yet that can be compared.\n"

"""Selective masks beside random ones: which rows meet, and which never do."""

from types import SimpleNamespace

from grass_lib.report.mask_pairs import mask_pairs, study_sentence


def row(spec, lds, **facts):
    return {"spec": spec, "attributor": "influence", "lds": {"mean": lds, "interval": [lds - 0.1, lds + 0.1]}, **facts}


def record(rows, experiment="gpt2_wikitext", **parameters):
    return SimpleNamespace(experiment=experiment, parameters={"seed": 0, **parameters}, results=rows)


RANDOM, SELECTIVE = "random_mask-32*32->sjlt-256", "selective_mask-32*32->sjlt-256"


def lines(*records):
    return [line for line in mask_pairs(records).splitlines() if line.startswith("|")][2:]


def test_rows_of_two_runs_meet():
    found = lines(record([row(RANDOM, 0.2)]), record([row(SELECTIVE, 0.15)], masks="learned"))
    assert found == [
        "| GPT-2 small + WikiText-2 "
        f"| {SELECTIVE} | 0.200 (0.100 to 0.300) | 0.150 (0.050 to 0.250) | -0.050 | learned |"
    ]


def test_a_row_of_the_same_run_is_preferred():
    own = record([row(RANDOM, 0.3), row(SELECTIVE, 0.4)], masks="energy")
    assert "| +0.100 | energy |" in lines(record([row(RANDOM, 0.2)]), own)[0]


def test_the_differences_are_put_into_words():
    text = mask_pairs([record([row(RANDOM, 0.2)]), record([row(SELECTIVE, 0.25)], masks="learned")])
    assert "1 of 1 are above zero" in text
    assert "The two intervals lie apart in none of them.\n\n:::{dropdown}" in text
    text = mask_pairs([record([row(RANDOM, 0.6)]), record([row(SELECTIVE, 0.1)], masks="learned")])
    assert "0 of 1 are above zero" in text
    assert "The two intervals lie apart in 1 of them.\n" in text


def test_other_protocols_attributors_and_pairs_never_meet():
    selective = record([row(SELECTIVE, 0.4)])
    for other in (
        record([row(RANDOM, 0.2)], data="test"),
        record([row(RANDOM, 0.2)], experiment="resnet9_cifar2"),
        record([row(RANDOM, 0.2) | {"attributor": "trak"}]),
        record([row("random_mask-64*64->sjlt-256", 0.2)]),
        record([row(RANDOM, 0.2, way="random")]),
        record([row(RANDOM, 0.2) | {"lds": None}]),
    ):
        assert mask_pairs([other, selective]).startswith("No run at paper scale")


def test_a_compression_appears_once_by_method():
    random = record([row(RANDOM, 0.2)])
    again = [
        record([row(SELECTIVE, value)], masks=masks)
        for value, masks in ((0.3, "learned"), (0.4, "learned"), (0.5, "energy"))
    ]
    found = lines(random, *again)
    assert [line.split(" | ")[-2:] for line in found] == [["+0.100", "learned |"], ["+0.300", "energy |"]]


def study(*intervals):
    return SimpleNamespace(experiment="mlp_masks", extra={"differences": [{"interval": pair} for pair in intervals]})


def test_the_study_is_put_into_words():
    assert study_sentence([SimpleNamespace(experiment="mlp_mnist", extra={})]) == ""
    worse = study_sentence([study([-0.3, -0.1], [-0.2, 0.1])])
    for part in ("of 2 differences", "0 are above", "1 below"):
        assert part in worse
    assert worse.endswith("better than a random mask.\n")
    assert "no way to choose" not in study_sentence([study([0.1, 0.2])])

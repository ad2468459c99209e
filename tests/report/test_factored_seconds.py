"""FactGraSS beside LoGra: ratios of seconds in one run, and their share of the passes."""

from types import SimpleNamespace

from grass_lib.report.factored_seconds import factored_seconds_sentence


def row(spec, k, measured, published, run="a", metric="projection_seconds"):
    first, second = spec.split("->")
    return {
        "experiment": "gpt2_wikitext", "sparsification": first, "projection": second, "k": k, "metric": metric,
        "measured": measured, "published": published, "run_id": run,
    }  # fmt: skip


ROWS = [
    row("normal-16*16->identity", 256, 0.25, 10.0),
    row("random_mask-32*32->sjlt-256", 256, 1.0, 3.0),
    row("normal-32*32->identity", 1024, 0.2, 10.0),
    row("random_mask-64*64->sjlt-1024", 1024, 0.3, 3.5),
    row("sjlt-16*16->identity", 256, 9.0, 9.0),
    row("normal-16*16->identity", 256, 0.9, 0.5, metric="lds"),
]
RECORD = SimpleNamespace(run_id="a", results=[{"seconds": {"gradients": 6.5}}, {"seconds": {"gradients": 6.4}}, {}])


def test_ratios_and_what_they_stand_beside():
    found = factored_seconds_sentence(ROWS, [RECORD])
    assert "FactGraSS takes 1.50 to 4.00 times as long as LoGra to compress here, 0.30 to 0.35 times" in found
    assert (
        "at most 0.25 s; forward and backward passes take 6.5 s, and none of these compressions more than 1.00 s"
        in found
    )


def test_only_what_one_run_measured():
    assert factored_seconds_sentence([], []) == ""
    others = [ROWS[0], row("random_mask-32*32->sjlt-256", 256, 1.0, 3.0, run="b")]
    assert factored_seconds_sentence(others, [RECORD]) == ""
    alone = factored_seconds_sentence(ROWS[:2], [])
    assert alone.endswith("4.00 times as long as LoGra to compress here, 0.30 times as published.\n")

"""The ledger: every published figure, ours beside it, and a verdict with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grass_lib.report.claims import THROUGHPUT, claim_row
from grass_lib.report.matching import Measured, RowIndex, choices_text, like_for_like
from grass_lib.report.published import published_claims, published_rows
from grass_lib.report.schema import RunRecord
from grass_lib.report.style import reference_method, stage_text
from grass_lib.report.tables import seconds_ratios

#: Largest difference of two LDS values that still counts as the same, whatever the interval.
TOLERANCE = 0.02
METRICS = ("lds", "projection_seconds")
#: Metrics in words.
METRIC_TITLES = {
    "lds": "LDS",
    "projection_seconds": "projection time (s)",
    THROUGHPUT: "throughput, % faster than LoGra",
}
#: Commands whose runs have selective masks, where that is not the pair's own.
SELECTIVE = {
    "mlp_mnist": "grass run mlp_masks --scale paper",
    "resnet9_cifar2": "grass run resnet9_cifar2 --scale paper -p masks=energy",
}

#: What is known to differ from the published protocol of a pair, for all of its rows and for those with a mask.
DIFFERENCES = {
    "musictransformer_maestro": (
        "queries are windows of the test split, the published ones generated pieces",
        "the reference adds up the masks of two parts of this model's gradient, and draws selective ones at random",
    )
}


def _family(sparsification: str, projection: str) -> str:
    text = sparsification if projection == "identity" else projection
    return text.split("-", 1)[0]


def _value(item: Measured, metric: str) -> float:
    return float(item.row["lds"]["mean"] if metric == "lds" else item.row["projection_seconds"])


def _text_interval(interval: list[float] | None) -> str:
    return f", 95 % interval {interval[0]:.3f} to {interval[1]:.3f}" if interval else ""


def _not_run(index: RowIndex, published: Mapping[str, Any], projection: str, registered: Iterable[str]) -> str:
    experiment = published["experiment"]
    record = index.known(experiment)
    selective = "selective" in published["sparsification"] or "selective" in projection
    if experiment not in registered:
        return "this version has no notebook for the pair"
    if selective:
        run = SELECTIVE.get(experiment, f"grass run {experiment} --scale paper")
        return f"needs a mask that is fitted to the training data, which no paper-scale run here has used; `{run}` does"
    stages = f"--sparsification '{published['sparsification']}' --projection '{projection}'"
    if record is None:
        return f"no finished run at paper scale; make one with `grass run {experiment} --scale paper`"
    run = f"run {record.run_id}{choices_text(record)}"
    return f"{run} has no such row; make one with `grass run {experiment} --scale paper {stages}`"


def _beside(index: RowIndex, published: Mapping[str, Any], metric: str) -> str:
    """For a published fjlt row: what our own fjlt, another operator, gives."""
    ours = index.find(published, published["projection"], metric)
    if ours is None:
        return ""
    value = _value(ours, metric)
    if metric == "lds":
        return f"; our blocked fjlt, another operator: {value:.4f}{_text_interval(ours.row['lds'].get('interval'))}"
    return f"; our blocked fjlt, another operator: {value:.4g} s"


def _damping_text(published: Mapping[str, Any], item: Measured) -> str:
    if item.row.get("damping") is None:
        return ""
    edge = "(edge of the grid)" if item.row.get("damping_at_edge") else ""
    damping = f"{item.row['damping']:g} {edge}".rstrip()
    convention = item.row.get("damping_convention")
    if published["attributor"] != "trak":  # the reference's influence functions have relative damping, as ours
        return f"; damping {damping}, published {published['damping']:g}, both relative to the mean eigenvalue"
    if like_for_like(published["projection"]) != published["projection"]:
        return f"; damping {damping} ({convention})"
    if convention == "paper":
        return f"; damping {damping}, published {published['damping']:g}"
    return f"; damping {damping} relative to the mean eigenvalue, published {published['damping']:g} absolute"


def _mask_text(item: Measured) -> str:
    """How the mask of a selective row was chosen; the reference learned its masks at a network that was not trained."""
    if "way" in item.row:
        same = ("way", "shared", "projection", "sparsification")
        seeds = [
            row["lds"]["mean"] for row in item.record.results if all(row.get(key) == item.row[key] for key in same)
        ]
        spread = f", the first of {len(seeds)} seeds ({min(seeds):.4f} to {max(seeds):.4f})" if len(seeds) > 1 else ""
        return f"; one mask for all networks, learned at the first trained one{spread}"
    return f"; masks of the kind {item.row['masks']!r}, at the trained model" if item.row.get("masks") else ""


def _difference_text(published: Mapping[str, Any]) -> str:
    """What is known to differ in the protocol of a published row."""
    rows, masks = DIFFERENCES.get(published["experiment"], ("", ""))
    has_mask = "mask" in published["sparsification"] or "mask" in published["projection"]
    return "".join(f"; {text}" for text in (rows, masks if has_mask else "") if text)


def _judge_lds(published: Mapping[str, Any], item: Measured) -> tuple[str, str]:
    lds = item.row["lds"]
    difference = lds["mean"] - published["lds"]
    half = (lds["interval"][1] - lds["interval"][0]) / 2 if lds.get("interval") else 0.0
    allowed = max(TOLERANCE, half)
    detail = (
        _damping_text(published, item) + _mask_text(item) + f"; {lds['n_models']} models, {lds['n_queries']} queries"
    )
    if item.record.data["kind"] == "subset":
        detail += ", a subset of the paper's data"
    if item.record.data["kind"] == "recompressed":
        detail += ", the paper's images compressed once more"
    if item.record.parameters.get("recipe"):
        detail += f", recipe={item.record.parameters['recipe']}"
    detail += _difference_text(published)
    if item.substitute:
        return (
            "not comparable",
            f"substitute {item.substitute}{item.choices}: difference {difference:+.4f} says nothing{detail}",
        )
    if item.changed:
        return (
            "not comparable",
            f"another protocol than the paper's ({item.changed}){item.choices}: difference {difference:+.4f}{detail}",
        )
    # Differences of rounded decimals: what equals the allowance on paper must count as equal.
    if abs(difference) <= allowed + 1e-9:
        which = "half the interval" if half > TOLERANCE else "the tolerance"
        return "reproduced", f"difference {difference:+.4f} is within {which}, {allowed:.4f}{detail}"
    side = "above" if difference > 0 else "below"
    limit = "half the interval" if half > TOLERANCE else f"the tolerance; half the interval is {half:.4f}"
    return (
        "differs",
        f"{abs(difference):.4f} {side} the published value, more than the {allowed:.4f} allowed ({limit}){detail}",
    )


def _ratio(published: Mapping[str, Any], item: Measured) -> str:
    """Both times divided by that of one method at the same k, ours within one run."""
    projection = like_for_like(published["projection"])
    compression = stage_text(published["sparsification"], projection)
    reference = reference_method(published["sparsification"])
    rows = [row for row in item.record.results if row["attributor"] == published["attributor"]]
    ours = seconds_ratios(rows, reference).get(compression)
    theirs = seconds_ratios(published_rows(published["experiment"]), reference).get(
        stage_text(published["sparsification"], published["projection"])
    )
    device = item.record.device.get("name", "another device")
    text = f"seconds of two different machines ({device} here{item.choices})"
    if ours is None or theirs is None:
        return text
    name = f"LoGra at k = {published['k']} per layer" if reference == "normal" else f"sjlt-{published['k']}"
    return f"{text}; compare ratios: {ours:.2f} times {name} here, {theirs:.2f} times as published"


def _row(index: RowIndex, published: Mapping[str, Any], metric: str, registered: Iterable[str]) -> dict[str, Any]:
    projection = like_for_like(published["projection"])
    item = index.find(published, projection, metric)
    row: dict[str, Any] = {
        "experiment": published["experiment"],
        "attributor": published["attributor"],
        "sparsification": published["sparsification"],
        "projection": published["projection"],
        "k": published["k"],
        "metric": metric,
        "published": published[metric],
        "measured": None,
        "interval": None,
        "operator": _family(published["sparsification"], projection),
        "data": None,
        "verdict": "not run",
        "reason": "",
        "run_id": None,
    }
    other = projection != published["projection"]
    beside = _beside(index, published, metric) if other else ""
    like = "the published fjlt was a dense Rademacher projection: measured is ours of that kind; " if other else ""
    if item is None:
        return {**row, "reason": _not_run(index, published, projection, registered) + beside}
    if metric == "lds":
        verdict, reason = _judge_lds(published, item)
    else:
        verdict, reason = "not comparable", _ratio(published, item)
    return {
        **row,
        "measured": _value(item, metric),
        "interval": item.row["lds"].get("interval") if metric == "lds" else None,
        "operator": item.row.get("operator") or row["operator"],
        "data": item.record.data["kind"],
        "verdict": verdict,
        "reason": like + reason + beside,
        "run_id": item.record.run_id,
    }


def ledger_rows(records: Iterable[RunRecord], benchmarks: Path | None = None) -> list[dict[str, Any]]:
    """One row per published figure and metric, and one per published claim.

    Only records of scale ``paper`` fill ``measured``. The published rows called ``fjlt`` are set beside our
    ``rademacher``, the same operator; their reason also gives our ``fjlt``, which is another one.

    Args:
        records: run records, the preferred ones first.
        benchmarks: folder of the results of ``grass bench``; None for ``book/measured`` of the project.

    Returns:
        Dictionaries with the keys `FIELDS`, in the order of the published rows. ``interval`` is ``[low, high]`` of
        an LDS.
    """
    from grass_lib.experiments import EXPERIMENTS

    index = RowIndex(records)
    registered = frozenset(EXPERIMENTS)
    rows = [_row(index, published, metric, registered) for published in published_rows() for metric in METRICS]
    return rows + [claim_row(index, claim, registered, benchmarks) for claim in published_claims()]

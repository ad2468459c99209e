"""Selective masks beside random ones of the same pair, for every pair whose runs have both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from grass_lib.report.matching import STUDIES
from grass_lib.report.style import experiment_title
from grass_lib.report.tables import Row, interval_text

if TYPE_CHECKING:
    from grass_lib.report.record import RunRecord

_PROTOCOL = ("seed", "data", "base", "recipe", "hessian", "n_lds_models")
"""Parameters that decide networks, queries and curvature; runs that differ in one are not compared."""
_NONE = "No run at paper scale has a selective mask and a random one of the same size yet.\n"


def mask_pairs(records: Iterable[RunRecord]) -> str:
    """LDS of selective and of random masks, compression by compression.

    The two rows come from the same queries and from networks of the same seeds, which another run trains anew; each is
    with its own best damping. Studies that compare masks within one run (rows with a way) have their own.

    Args:
        records: Verified runs at paper scale.

    Returns:
        MyST: what the differences say, and the table folded; or a sentence where there is nothing to compare.
    """
    found = list(_pairs(list(records)))
    if not found:
        return _NONE
    lines = [
        f"| {experiment_title(pair)} | {selective['spec'].removesuffix('->identity')} | "
        f"{_lds(random)} | {_lds(selective)} | {_difference(selective, random):+.3f} | {method} |"
        for pair, selective, random, method in found
    ]
    header = [
        "| Pair | Compression | LDS, random mask | LDS, selective mask | Difference | Mask chosen by |",
        "|---|---|---|---|---|---|",
    ]
    table = "\n".join([*header, *lines])
    return f"{_conclusion(found)}\n:::{{dropdown}} Every compression\n{table}\n:::\n"


def _difference(selective: Row, random: Row) -> float:
    return selective["lds"]["mean"] - random["lds"]["mean"]


def _conclusion(found: Sequence[tuple[str, Row, Row, str]]) -> str:
    """How many differences are above zero, by pair, and whether any leaves the intervals of both rows."""
    parts = []
    for pair in dict.fromkeys(item[0] for item in found):
        values = [_difference(selective, random) for own, selective, random, _ in found if own == pair]
        above = sum(value > 0 for value in values)
        parts.append(f"{above} of {len(values)} are above zero for {experiment_title(pair)}")
    apart = sum(_apart(selective, random) for _, selective, random, _ in found)
    return f"Of the differences, {', '.join(parts)}. The two intervals lie apart in {apart or 'none'} of them.\n"


def _apart(one: Row, other: Row) -> bool:
    first, second = one["lds"].get("interval"), other["lds"].get("interval")
    return bool(first and second and (first[0] > second[1] or second[0] > first[1]))


def study_sentence(records: Iterable[RunRecord]) -> str:
    """What the newest study found, in words: how many differences from a random mask are surely above or below zero.

    Args:
        records: Verified runs at paper scale.

    Returns:
        A sentence; empty where there is no study.
    """
    for record in records:
        differences = (record.extra or {}).get("differences")
        if record.experiment in STUDIES and differences:
            above = sum(row["interval"][0] > 0 for row in differences)
            below = sum(row["interval"][1] < 0 for row in differences)
            none = (
                "" if above else ": on this pair no way to choose coordinates is shown to be better than a random mask"
            )
            return (
                f"There, of {len(differences)} differences from a random mask (by method, k and sharing), {above} are "
                f"above zero with their whole 95 % interval and {below} below it{none}.\n"
            )
    return ""


def _pairs(records: list[RunRecord]) -> Iterator[tuple[str, Row, Row, str]]:
    seen: set[tuple[Any, ...]] = set()
    for record in records:
        for row in record.results:
            key = (record.experiment, *_protocol(record), record.parameters.get("masks"), row.get("spec"))
            if "selective" not in str(row.get("spec")) or "way" in row or not row.get("lds") or key in seen:
                continue
            twin = _twin(record, row, records)
            if twin is not None:
                seen.add(key)
                yield record.experiment, row, twin, str(record.parameters.get("masks", ""))


def _twin(record: RunRecord, row: Row, records: list[RunRecord]) -> Row | None:
    wanted = row["spec"].replace("selective_", "random_")
    # Its own run first: there everything is the same.
    for other in (record, *records):
        if other.experiment == record.experiment and _protocol(other) == _protocol(record):
            for found in other.results:
                same = found.get("spec") == wanted and found["attributor"] == row["attributor"] and "way" not in found
                if same and found.get("lds"):
                    return found
    return None


def _protocol(record: RunRecord) -> tuple[Any, ...]:
    return tuple(record.parameters.get(name) for name in _PROTOCOL)


def _lds(row: Row) -> str:
    return f"{row['lds']['mean']:.3f} ({interval_text(row['lds'].get('interval'))})"

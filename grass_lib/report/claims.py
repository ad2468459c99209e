"""Rows of the ledger for published claims, and the keys that all its rows have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grass_lib.bench.systems_plan import CLAIMED_AGAINST
from grass_lib.project import project_root
from grass_lib.report.matching import Measured, RowIndex
from grass_lib.report.systems_bench import load_earlier, load_systems
from grass_lib.words import faster

THROUGHPUT = "throughput_percent_faster"
FIELDS = (
    "experiment",
    "attributor",
    "sparsification",
    "projection",
    "k",
    "metric",
    "published",
    "measured",
    "interval",
    "operator",
    "data",
    "verdict",
    "reason",
    "run_id",
)


def claim_row(
    index: RowIndex, claim: Mapping[str, Any], registered: Iterable[str], benchmarks: Path | None = None
) -> dict[str, Any]:
    """The throughput claim; ours is the record's note `THROUGHPUT`, or the benchmark of all systems.

    Args:
        index: Of our records.
        claim: Of the published ones.
        registered: Experiments that there are.
        benchmarks: Folder of their results; None for ``book/measured`` of the project.

    Returns:
        With the keys `FIELDS`.
    """
    stated = re.search(r"(\d+(?:\.\d+)?) ?%", claim["claim"])
    record = index.known(claim["experiment"])
    measured = None if record is None else record.extra.get(THROUGHPUT)
    bench = None if measured is not None else throughput_bench(claim["experiment"], benchmarks)
    published = float(stated[1]) if stated else None
    row = dict.fromkeys(FIELDS) | {
        "experiment": claim["experiment"],
        "attributor": "influence_efim",
        "metric": THROUGHPUT,
        "published": published,
        "operator": "factgrass",
        "verdict": "not run",
    }
    stated_text = f"claimed: {claim['claim']} ({claim['protocol']})"
    if bench is not None and published is not None:
        found = float(bench[THROUGHPUT])
        runs = earlier_benches(claim["experiment"], benchmarks)
        others = f" ({', '.join(map(faster, runs))} in earlier runs on other machines)" if runs else ""
        return {
            **row,
            "measured": found,
            "data": "substitute",
            "verdict": "not comparable",
            "reason": f"{faster(found, CLAIMED_AGAINST)}{others}, curvature included, on "
            f"{bench['device']}, ours compiled and with its chunked loss, LogIX as documented; weights and tokens are "
            f"random substitutes ({bench['command']}, {bench['date']}); "
            f"{stated_text}",
        }
    if record is None or measured is None or published is None:
        command = "`grass bench systems --shape llama --json book/measured/systems-llama.json`"
        missing = (
            "has no notebook in this version"
            if claim["experiment"] not in registered
            else f"was not measured beside LogIX; {command} does that"
        )
        return {**row, "reason": f"{claim['experiment']} {missing}; {stated_text}"}
    substitute = Measured(record, {}).substitute
    verdict = "not comparable" if substitute else "reproduced" if measured >= published else "differs"
    prefix = f"substitute {substitute}; " if substitute else ""
    reason = f"{prefix}{faster(measured, 'LoGra')} on the same device here; {stated_text}"
    return {
        **row,
        "measured": float(measured),
        "data": record.data["kind"],
        "verdict": verdict,
        "reason": reason,
        "run_id": record.run_id,
    }


def throughput_bench(experiment: str, benchmarks: Path | None = None) -> dict[str, Any] | None:
    """The committed result of ``grass bench systems`` on a claim's shape; None where there is none from a GPU.

    Args:
        experiment: of the claim.
        benchmarks: Folder of results; None for ``book/measured`` of the project.
    """
    found = load_systems(_folder(benchmarks), _shape(experiment))
    fits = found is not None and found.get("device_type") == "cuda" and found.get(THROUGHPUT) is not None
    return found if fits else None


def earlier_benches(experiment: str, benchmarks: Path | None = None) -> list[float]:
    """The claim's figure in earlier runs of `throughput_bench`; arguments as there."""
    runs = load_earlier(_folder(benchmarks), _shape(experiment))
    return [float(run[THROUGHPUT]) for run in runs if run.get("device_type") == "cuda" and THROUGHPUT in run]


def _folder(benchmarks: Path | None) -> Path:
    return benchmarks or project_root() / "book" / "measured"


def _shape(experiment: str) -> str:
    return experiment.split("_")[0].rstrip("0123456789")

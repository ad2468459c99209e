"""What several ranks have to be like, judged on a result of `grass bench scaling`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grass_lib.bench.results import judged

SPEEDUP, ROW, SCORE, NOTICED = 1.9, 1e-2, 1e-5, 60.0
"""Two ranks over one in tokens/s; worst row and score against one rank; seconds until a lost rank is an error."""


def goals(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Compares a result with the goals; only those that could be measured are in it, speed on GPUs alone.

    Args:
        result: Of `grass_lib.bench.scaling.run`.

    Returns:
        ``{"goal", "measured", "limit", "unit", "at_most", "met"}``; ``measured`` is None where there was nothing to
        measure, which is a goal missed: stores that are not alike, an error that names nobody.
    """
    parts, found = result["parts"], []
    caching = parts.get("caching", {})
    if "speedup" in caching and result["device_type"] == "cuda":
        found.append(judged("caching with two ranks, times one", caching["speedup"], SPEEDUP, "x", False))
    for part, found_part in parts.items():
        store = found_part.get("store")
        if store is not None:
            worst = None if store["problems"] else store["worst_row"]
            found.append(judged(f"{part}: largest relative difference of a row from one rank's", worst, ROW, "", True))
        if "score_error" in found_part:
            found.append(
                judged(
                    f"{part}: largest relative difference of scores from one rank's",
                    found_part["score_error"],
                    SCORE,
                    "",
                    True,
                )
            )
    for world in (1, 2):
        errors = [each["error"] for each in parts.get("curvature", {}).get(f"sums_{world}", []) if "error" in each]
        if errors:
            found.append(
                judged(
                    f"sums over {world} rank{'' if world == 1 else 's'}: largest relative difference from float64",
                    max(errors),
                    SCORE,
                    "",
                    True,
                )
            )
    kill = parts.get("kill", {})
    if "seconds_to_error" in kill:
        # An error that does not say who is gone helps nobody.
        late = kill["seconds_to_error"] if kill["names_rank"] and kill["code"] else None
        found.append(judged("a killed rank is an error that names it after", late, NOTICED, "s", True))
    if "kept_unchanged" in kill:
        kept = kill["kept_unchanged"] and kill["shards_kept"] > 0 and kill["resumed_code"] == 0
        found.append(judged("the next run goes on with the shards that are there", float(kept), 1.0, "", False))
    return found

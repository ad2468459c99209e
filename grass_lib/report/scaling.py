"""The page "Scaling out": tables and sentences drawn from the JSON of ``grass bench scaling``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grass_lib.bench.scaling_goals import goals
from grass_lib.report.results import read_result
from grass_lib.report.scaling_plan import plan_table

RESULT = "scaling.json"
_STUB = "Not measured yet: `grass bench scaling --json book/measured/scaling.json` writes it, on two GPUs.\n"
_PARTS = ("device", "goals", "caching", "curvature", "fsdp", "kill", "plan")
Result = Mapping[str, Any]


def load(folder: Path) -> dict[str, Any]:
    """Reads the benchmark.

    Args:
        folder: Usually ``book/measured``.

    Raises:
        RecordError: It is missing or has no parts.
    """
    result = read_result(folder / RESULT, "parts", "grass bench scaling --json PATH")
    return {**result, "goals": goals(result)}  # judged then too; the words are today's


def device_sentence(result: Result) -> str:
    """Where and how it was measured."""
    main, versions = result["main"], ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    name = "the shape of Llama-3.1-8B with random weights" if result["shape"] == "llama" else "a tiny model"
    return (
        f"Measured on two devices of one machine ({result.get('device', result['device_type'])}, {result['cores']} "
        f"cores) in one run of `{result['command']}` ({result['date']}; {versions}): {name}, `{main['spec']}`, "
        f"{main['rows']} blocks of {main['block']:,} random tokens in batches of {main['batch']}, shards of "
        f"{main['shard']} rows. Clocks start together after {2 * main['shard']} rows, and stop when the last shard of "
        "the slowest rank is on the disk.\n"
    )


def goal_table(result: Result) -> str:
    """The goals and what was measured, as a Markdown table."""
    lines = ["| goal | limit | measured | verdict |", "| --- | --- | --- | --- |"]
    for goal in result["goals"]:
        part, _, rest = goal["goal"].partition(": ")
        name = f"{_GOAL_PARTS[part]}: {rest}" if part in _GOAL_PARTS else goal["goal"]
        verdict = "met" if goal["met"] else "missed"
        if not goal["unit"] and goal["limit"] == 1.0 and not goal["at_most"]:
            lines.append(f"| {name} | yes | {'yes' if goal['met'] else 'no'} | {verdict} |")
            continue
        sign, unit = ("at most" if goal["at_most"] else "at least"), f" {goal['unit']}".rstrip()
        found = "nothing to compare" if goal["measured"] is None else f"{_plain(goal['measured'])}{unit}"
        lines.append(f"| {name} | {sign} {_plain(goal['limit'])}{unit} | {found} | {verdict} |")
    return "\n".join(lines) + "\n"


_GOAL_PARTS = {"fsdp": "a model over both", "kill": "after a lost rank"}


def _plain(value: float) -> str:
    """Three digits; powers of ten as one writes them."""
    return re.sub(r"e-0?(\d+)$", r"e-\1", f"{value:.3g}")


def _apart(error: float) -> str:
    """How scores compare, after the word "Scores"."""
    return "are equal" if error == 0 else f"differ by at most {_plain(float(f'{error:.1g}'))} of the largest"


def caching_section(result: Result) -> str:
    """Tokens a second, memory and start of every rank, and how the two stores compare."""
    part = result["parts"].get("caching", {})
    if "speedup" not in part:
        return _failed(part, "caching")
    lines = [
        "| ranks | tokens/s, all together | rows of each rank | peak memory of each | from the start to steady |",
        "| --- | --- | --- | --- | --- |",
    ]
    for world in (1, 2):
        ranks = part[f"ranks_{world}"]
        rows = ", ".join(str(each["samples"]) for each in ranks)
        start = max(each["warm_seconds"] for each in ranks)
        speed = part[f"tokens_per_second_{world}"]
        lines.append(f"| {world} | {speed:,.0f} | {rows} | {_peaks(ranks)} | {start:.0f} s |")
    text = "\n".join(lines) + f"\n\nTwo ranks cache {part['speedup']:.2f} times as many tokens a second as one. "
    return text + _store_sentence(part) + "\n"


def curvature_section(result: Result) -> str:
    """Sums over ranks, decompositions and scores: seconds and memory."""
    part = result["parts"].get("curvature", {})
    if "score_error" not in part:
        return _failed(part, "curvature")
    lines = ["| | one rank | two ranks |", "| --- | --- | --- |"]
    ranks = {world: part[f"ranks_{world}"] for world in (1, 2)}
    for key, name in _SCORED.items():
        found = [max(each["parts"][key] for each in ranks[world]) for world in (1, 2)]
        lines.append(f"| {name} | {found[0]:.2f} s | {found[1]:.2f} s |")
    lines.append(f"| peak memory of each rank while scoring | {_peaks(ranks[1])} | {_peaks(ranks[2])} |")
    sums = {world: part.get(f"sums_{world}", []) for world in (1, 2)}
    if all(each.get("eigen_seconds") for world in (1, 2) for each in sums[world]):
        first, size = sums[2][0], sums[2][0]["eigen_size"]
        for key, name in _SUMMED.items():
            found = [max(each[key] for each in sums[world]) for world in (1, 2)]
            lines.append(f"| {name.format(size=size)} | {found[0]:.2f} s | {found[1]:.2f} s |")
        lines.append(f"| peak memory of each rank with the sums | {_peaks(sums[1])} | {_peaks(sums[2])} |")
        said = (
            f" The sums of {first['layers']} layers of {size} features are {first['bytes'] / 1e9:.1f} GB on every rank "
            "before they are added, layer by layer, at the rank that a layer belongs to; the others then let theirs go."
        )
    else:
        why = part["error"].splitlines()[0][:200]
        said = f" The sums of outer products were not measured to their end. {why}".rstrip()
    shape = ranks[2][0]["shape"]
    return (
        "\n".join(lines)
        + f"\n\nScores of {shape[0]} rows for {shape[1]} queries. With fewer rows than features in a layer the library "
        "decomposes the rows' Gram matrix; the sums of outer products, which it takes where there are more rows, were "
        f"computed from the same rows beside it.{said} Scores of two ranks and of one {_apart(part['score_error'])}.\n"
    )


_SCORED = {
    "curvature": "decompositions of the rows' Gram matrices",
    "query_gradients": "gradients of the queries",
    "scoring": "preconditioning and scores",
}
_SUMMED = {
    "sum_seconds": "sums of outer products over a rank's own shards",
    "reduce_seconds": "adding the sums of all ranks",
    "eigen_seconds": "one decomposition of {size} by {size} in float64",
}


def fsdp_section(result: Result) -> str:
    """A model whose weights are spread over both: what each rank holds, and whether anything differs."""
    part = result["parts"].get("fsdp", {})
    if "score_error" not in part:
        return _failed(part, "fsdp")
    small, ranks = result["small"]["sizes"], part["ranks_2"]
    own = ", ".join(f"{each['own_weight_bytes'] / 1e6:.1f} MB" for each in ranks)
    speeds = [
        result["small"]["block"] * part[f"caching_{world}"][0]["steady_rows"] / _slowest(part[f"caching_{world}"])
        for world in (1, 2)
    ]
    return (
        f"A smaller Llama of {small['layers']} layers of width {small['width']} in float32, its weights of "
        f"{ranks[0]['weight_bytes'] / 1e6:.1f} MB spread over both devices with `fully_shard` ({own} each), against "
        f"one rank with all of them: {speeds[1]:,.0f} tokens/s of both together against {speeds[0]:,.0f}, peak memory "
        f"{_peaks(part['caching_2'])} against {_peaks(part['caching_1'])}. {_store_sentence(part)} Scores "
        f"{_apart(part['score_error'])}.\n"
    )


def kill_section(result: Result) -> str:
    """How soon a lost rank is an error, what it says, and how the next run ends."""
    part = result["parts"].get("kill", {})
    if "score_error" not in part:
        return _failed(part, "kill")
    said = "\n".join(part["said"])
    rows = " and ".join(str(each) for each in part["resumed_rows"])
    kept = "were left as they are" if part["kept_unchanged"] else "were written again"
    return (
        "Rank 1 was killed with SIGKILL in the middle of its work. The run ended "
        f"{part['seconds_to_error']:.1f} s later with exit code {part['code']} and said:\n\n```text\n{said}\n```\n\n"
        f"The same command, started again, computed {rows} rows; "
        f"the {part['shards_kept']} of {part['shards']} shards that were there {kept}. "
        f"{_store_sentence(part)} Scores {_apart(part['score_error'])}.\n"
    )


def write_scaling_parts(measured: Path, target: Path) -> list[Path]:
    """Writes the page's generated Markdown.

    Args:
        measured: Folder with the JSON file; where it is missing, the parts say how to make it.
        target: ``book/_generated``; the parts are ``scaling_*.md``.

    Returns:
        The files written.
    """
    target.mkdir(parents=True, exist_ok=True)
    parts = dict.fromkeys(_PARTS, _STUB)
    if (measured / RESULT).is_file():
        result = load(measured)
        parts = {
            "device": device_sentence(result),
            "goals": goal_table(result),
            "caching": caching_section(result),
            "curvature": curvature_section(result),
            "fsdp": fsdp_section(result),
            "kill": kill_section(result),
            "plan": plan_table(result),
        }
    written = []
    for name, text in parts.items():
        path = target / f"scaling_{name}.md"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def _failed(part: Mapping[str, Any], name: str) -> str:
    reason = (part.get("error") or "it was left out of the run").splitlines()[0][:300]
    return f"Not measured: {reason}. `grass bench scaling --parts {name}` measures it.\n"


def _slowest(ranks: list[Mapping[str, Any]]) -> float:
    return max(each["steady_seconds"] for each in ranks)


def _peaks(ranks: list[Mapping[str, Any]]) -> str:
    found = [each["peak_bytes"] for each in ranks if each["peak_bytes"] is not None]
    return ", ".join(f"{peak / 1e9:.2f} GB" for peak in found) or "not on this device"


def _store_sentence(part: Mapping[str, Any]) -> str:
    store = part["store"]
    if store["problems"]:
        return f"Damaged shards: {'; '.join(store['problems'])}."
    if not store["same_files"]:
        return "The two stores do not have the same shards."
    if store["same_checksums"] == store["shards"]:
        return f"All {store['shards']} shards have the checksums of one rank's store."
    return (
        f"{store['same_checksums']} of {store['shards']} shards have the checksums of one rank's store; rows of the "
        f"others differ by at most {store['worst_row']:.1g} of their norm."
    )

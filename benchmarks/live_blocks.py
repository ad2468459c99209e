"""What is allocated on the GPU when a step uses most of it: blocks by the line of code that asked for them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch


def live_at_peak(events: Iterable[Mapping[str, Any]]) -> tuple[int, Counter[tuple[str, int]]]:
    """The highest sum of bytes and the blocks that are live then.

    Args:
        events: Of one device or stream, as `torch.cuda.memory._snapshot` has them under ``device_traces``.

    Returns:
        Bytes, and how many live blocks there are by ``(line of code, bytes of one)``.
    """
    live: dict[int, tuple[str, int]] = {}
    now = peak = 0
    best: Counter[tuple[str, int]] = Counter()
    grown = False
    for event in events:
        if event["action"] == "alloc":
            live[event["addr"]] = (_line(event.get("frames", ())), event["size"])
            now += event["size"]
            grown = grown or now > peak
            peak = max(peak, now)
        elif event["action"] == "free_completed" and event["addr"] in live:
            if grown:  # the sum was highest just before
                best, grown = Counter(live.values()), False
            now -= live.pop(event["addr"])[1]
    return peak, Counter(live.values()) if grown else best


def by_stream(events: Iterable[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Events of allocations by stream, in the order in which they first allocate: the last one is the recording's."""
    found: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event["action"] in ("alloc", "free_completed"):
            found[event["stream"]].append(event)
    return dict(found)


def blocks_of(step: Callable[[], None], rows: int, events_to: Path | None = None) -> str:
    """Runs a step and shows the largest groups of blocks at the peak of each stream; what was there is not among them.

    A recorded step warms up on a stream of its own and is recorded on another one, whose memory is a pool of its own:
    the pool's bytes beyond the peak are what allocations of different sizes leave between them.

    Args:
        step: The first call of a step.
        rows: How many groups to show.
        events_to: Where the events are written as JSON: stream, action, address, bytes and line of code of each.
    """
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python")
    try:
        step()
        torch.cuda.synchronize()
        traces = torch.cuda.memory._snapshot()["device_traces"]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    streams = by_stream(traces[torch.cuda.current_device()])
    pools = [part for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) != (0, 0)]
    lines = [f"  pools of recordings hold {sum(part['total_size'] for part in pools) / 1e6:,.0f} MB"] if pools else []
    for place, events in enumerate(streams.values()):
        peak, blocks = live_at_peak(events)
        lines.append(
            f"  stream {place + 1} of {len(streams)}: {peak / 1e6:,.0f} MB above what was there, in {blocks.total()} "
            "blocks"
        )
        groups = sorted(blocks.items(), key=lambda group: -group[0][1] * group[1])
        lines += [
            f"  {size * count / 1e6:9,.1f} MB = {count:4} x {size / 1e6:9,.3f}  {line}"
            for (line, size), count in groups[:rows]
        ]
    if events_to is not None:
        shown = [
            (place, event["action"], event["addr"], event["size"], _line(event.get("frames", ())))
            for place, events in enumerate(streams.values())
            for event in events
        ]
        events_to.write_text(json.dumps(shown) + "\n", encoding="utf-8")
    return "\n".join(lines)


def _line(frames: Iterable[Mapping[str, Any]]) -> str:
    """The innermost line that is Python's."""
    for frame in frames:
        if frame["filename"].endswith(".py"):
            return f"{'/'.join(frame['filename'].split('/')[-2:])}:{frame['line']} {frame['name']}"
    return "(no Python)"

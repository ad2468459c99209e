"""What is allocated on the GPU when a step uses most of it: blocks by the line of code that asked for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch


def live_at_peak(events: Iterable[Mapping[str, Any]]) -> tuple[int, Counter[tuple[str, int]]]:
    """The highest sum of bytes and the blocks that are live then.

    Args:
        events: Of one device, as `torch.cuda.memory._snapshot` has them under ``device_traces``.

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


def blocks_of(step: Callable[[], None], rows: int) -> str:
    """Runs a step and shows the largest groups of blocks at its peak; what was there before is not among them."""
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python")
    try:
        step()
        torch.cuda.synchronize()
        traces = torch.cuda.memory._snapshot()["device_traces"]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    peak, blocks = live_at_peak(traces[torch.cuda.current_device()])
    groups = sorted(blocks.items(), key=lambda group: -group[0][1] * group[1])
    lines = [f"  {peak / 1e6:,.0f} MB above what was there, in {blocks.total()} blocks"]
    lines += [
        f"  {size * count / 1e6:9,.1f} MB = {count:4} x {size / 1e6:9,.3f}  {line}"
        for (line, size), count in groups[:rows]
    ]
    return "\n".join(lines)


def _line(frames: Iterable[Mapping[str, Any]]) -> str:
    """The innermost line that is Python's."""
    for frame in frames:
        if frame["filename"].endswith(".py"):
            return f"{'/'.join(frame['filename'].split('/')[-2:])}:{frame['line']} {frame['name']}"
    return "(no Python)"

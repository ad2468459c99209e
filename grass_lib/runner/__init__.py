"""Batches of notebooks: plan, execute with papermill, verify, skip what is finished."""

from grass_lib.runner.collect import find_run, run_folders, verified_records
from grass_lib.runner.execute import Outcome, execute_run, run_all
from grass_lib.runner.planning import PlannedRun, plan
from grass_lib.runner.verify import verify_run

__all__ = [
    "Outcome",
    "PlannedRun",
    "execute_run",
    "find_run",
    "plan",
    "run_all",
    "run_folders",
    "verified_records",
    "verify_run",
]

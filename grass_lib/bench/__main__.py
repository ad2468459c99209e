"""``python -m grass_lib.bench``: ``grass bench projections`` without the command line's packages."""

import argparse
import logging
import sys
from pathlib import Path

from grass_lib.bench.projections import run, summary
from grass_lib.bench.results import write
from grass_lib.project import runs_root


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m grass_lib.bench")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default="", choices=("", "shapes", "dtype", "density", "k"))
    parser.add_argument("--json", type=Path, default=runs_root() / "bench" / "projections.json")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = run(options.device, repeats=options.repeats, only=options.only)
    write(result, options.json)
    sys.stdout.write(summary(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

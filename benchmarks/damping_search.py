"""The search for a damping value, our way and the reference's way, both in this library's code.

    python -m benchmarks.damping_search --out damping_search.json

The reference calls ``cache()`` once for each of ten damping values and scores a tenth of the queries (validation), then
once more for the chosen value and scores the others: every gradient of the training set is computed eleven times. Ours
computes all gradients once and scores all queries for the whole grid. Evaluating the scores is left out: it is the same
work both ways. ``--paper`` takes the sizes of the paper's MNIST protocol, of which the defaults are a part; "masked"
rows let both ways compute kept coordinates alone; there the solves weigh more beside the gradients. The last column
sets ours beside the reference's way with full gradients, the only ones that it has.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from benchmarks.damping_grid import GRID, digits, seconds, trained_mlp
from grass_lib.attribution import TRAK


def ours(trak: TRAK, train: DataLoader, queries: DataLoader) -> Tensor:
    """Scores ``(n_damping, n_train, n_query)``."""
    trak.cache(train)
    found = trak.attribute(queries, damping=GRID)
    assert isinstance(found, Tensor)
    return found


def reference(trak: TRAK, train: DataLoader, validation: DataLoader, test: DataLoader, chosen: float) -> list[Tensor]:
    """Scores of the validation queries for each value, then of the others for the chosen one."""
    found = []
    for damping in [*GRID, chosen]:
        trak.cache(train)
        scores = trak.attribute(validation if len(found) < len(GRID) else test, damping=damping)
        assert isinstance(scores, Tensor)
        found.append(scores)
    return found


def measure(spec: str, gradients: Any, n: int, m: int, checkpoints: int, device: torch.device, repeats: int) -> dict:
    data, queries = digits(n, 1), digits(m, 2)
    models = [trained_mlp(data, device, seed) for seed in range(checkpoints)]
    trak = TRAK(models[0], [one.state_dict() for one in models], projection=spec, gradients=gradients, progress=False)
    train, everything = DataLoader(data, batch_size=64), DataLoader(queries, batch_size=64)
    validation = DataLoader(Subset(queries, range(m // 10)), batch_size=64)
    test = DataLoader(Subset(queries, range(m // 10, m)), batch_size=64)
    chosen = GRID[6]
    kept: dict[str, Any] = {}

    def run_reference() -> None:
        kept["found"] = reference(trak, train, validation, test, chosen)

    grid = ours(trak, train, everything)
    theirs = seconds(run_reference, device, 1, warm_up=False)
    *tried, last = kept["found"]
    joined = [(one - grid[index][:, : m // 10], grid[index]) for index, one in enumerate(tried)]
    joined.append((last - grid[6][:, m // 10 :], grid[6]))
    error = max(float(difference.abs().max() / scores.abs().max()) for difference, scores in joined)
    row: dict[str, Any] = {
        "spec": spec,
        "gradients": trak.gradients,
        "ours_seconds": seconds(lambda: ours(trak, train, everything), device, repeats),
        "reference_seconds": theirs,
        "largest_relative_difference": error,
    }
    row["times_faster"] = theirs / row["ours_seconds"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--paper", action="store_true", help="5,000 training samples and 500 queries, k 2048")
    parser.add_argument("--k", type=int)
    parser.add_argument("--checkpoints", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("damping_search.json"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    n, m, k = (5000, 500, 2048) if arguments.paper else (2000, 100, 256)
    k = arguments.k or k
    rows = [
        measure(spec, gradients, n, m, arguments.checkpoints, device, arguments.repeats)
        for spec, gradients in ((f"sjlt-{k}", "full"), (f"random_mask-{k}", "full"), (f"random_mask-{k}", "masked"))
    ]
    for row in rows:
        full = next(other for other in rows if (other["spec"], other["gradients"]) == (row["spec"], "full"))
        row["times_faster_than_full"] = full["reference_seconds"] / row["ours_seconds"]
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    facts = {"device": name, "torch": torch.__version__, "n_train": n, "n_query": m, "rows": rows}
    arguments.out.write_text(json.dumps({"checkpoints": arguments.checkpoints, **facts}, indent=1) + "\n")
    print(f"{name}: n_train {n}, n_query {m}, {arguments.checkpoints} checkpoint(s), {len(GRID)} dampings")
    print(
        f"{'compression':18} {'gradients':9} {'ours s':>8} {'reference':>12} {'x':>6} {'x full':>7} {'difference':>11}"
    )
    for row in rows:
        print(
            f"{row['spec']:18} {row['gradients']:9} {row['ours_seconds']:8.2f} {row['reference_seconds']:12.2f} "
            f"{row['times_faster']:6.1f} {row['times_faster_than_full']:7.1f} "
            f"{row['largest_relative_difference']:11.1e}"
        )


if __name__ == "__main__":
    main()

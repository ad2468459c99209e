"""What a grid of ten damping values costs beside one value, which solver is faster, and what float32 would lose.

Run ``python -m benchmarks.damping_grid`` from the repository root; ``--paper`` takes the sizes of the paper's MNIST
protocol. The features are those of an MLP (109,386 weights) trained briefly on synthetic digits, compressed by sjlt.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from grass_lib.attribution import TRAK, damped_scores
from grass_lib.errors import GrassError
from grass_lib.gradients import PerSampleGradients, margin, project_loader
from grass_lib.projection import build_projector

GRID = [10.0**exponent for exponent in range(-7, 3)]


def digits(n: int, seed: int) -> TensorDataset:
    """Noisy prototypes of ten classes, ``(n, 784)``, with a constant background as digits have."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(10, 784, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 10, (n,), generator=generator)
    low_rank = torch.randn(n, 32, generator=generator) @ torch.randn(32, 784, generator=generator) / 4
    x = 0.3 * prototypes[labels] + low_rank + 0.3 * torch.randn(n, 784, generator=generator)
    x[:, :300] = -0.42
    return TensorDataset(x, labels)


def trained_mlp(data: TensorDataset, device: torch.device, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(784, 128),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(64, 10),
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        for x, y in DataLoader(data, batch_size=64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
            optimizer.step()
    return model


def seconds(work: Callable[[], object], device: torch.device, repeats: int, *, warm_up: bool = True) -> float:
    """The least of several timings, after a warm-up; processor time on a CPU, which other programs disturb less."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    found = []
    for _ in range(repeats + warm_up):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(clock() - start)
    return min(found[warm_up:])


def in_float32(train: Tensor, query: Tensor, damping: float) -> Tensor | None:
    """The same scores with Gram matrix and Cholesky in float32; None where the factorisation fails."""
    dual = train.shape[1] > len(train)
    matrix = train @ train.mT if dual else train.mT @ train
    matrix.diagonal().add_(damping * float(matrix.diagonal().sum()) / train.shape[1])
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        return None
    return torch.cholesky_solve(train @ query.mT, factor) if dual else train @ torch.cholesky_solve(query.mT, factor)


def float32_errors(train: Tensor, query: Tensor) -> dict[str, float | None]:
    """Largest error of float32 arithmetic by damping value, as a share of the largest score; None where it fails."""
    out = torch.zeros(len(GRID), len(train), len(query), dtype=torch.float64, device=train.device)
    errors: dict[str, float | None] = {}
    for damping, expected in zip(GRID, damped_scores(train, query, GRID, out=out), strict=True):
        found = in_float32(train, query, damping)
        errors[f"{damping:g}"] = None if found is None else float((found - expected).abs().max() / expected.abs().max())
    return errors


def measure(k: int, data: TensorDataset, queries: TensorDataset, checkpoints: int, device: torch.device, repeats: int):
    models = [trained_mlp(data, device, seed) for seed in range(checkpoints)]
    train_loader, query_loader = DataLoader(data, batch_size=64), DataLoader(queries, batch_size=64)
    trak = TRAK(models[0], [model.state_dict() for model in models], projection=f"sjlt-{k}", progress=False)
    row: dict[str, object] = {"k": k, "system": "dual" if k > len(data) else "primal"}
    row["cache_seconds"] = seconds(lambda: trak.cache(train_loader), device, repeats)
    for name, grid in (("one", [0.1]), ("ten", GRID)):
        row[f"attribute_seconds_{name}"] = seconds(
            lambda grid=grid: trak.attribute(query_loader, damping=grid), device, repeats
        )
    one, ten = (row["cache_seconds"] + row[f"attribute_seconds_{name}"] for name in ("one", "ten"))
    row["ratio_cache_and_attribute"] = ten / one
    row["ratio_attribute"] = row["attribute_seconds_ten"] / row["attribute_seconds_one"]

    rows = PerSampleGradients(models[0], margin)
    specs = {"sjlt": f"sjlt-{k}", "mask": f"random_mask-{k}"}
    projectors = {name: build_projector(spec, rows.p, device=device) for name, spec in specs.items()}
    trains, asked = (
        project_loader(rows, None, loader, projectors, progress=False)[0] for loader in (train_loader, query_loader)
    )
    train, query = trains["sjlt"], asked["sjlt"]
    for method in ("cholesky", "eigh"):
        for name, grid in (("one", [0.1]), ("ten", GRID)):
            row[f"{method}_seconds_{name}"] = seconds(
                lambda grid=grid, method=method: damped_scores(train, query, grid, method=method), device, repeats
            )
    row["float32_error"] = {spec: float32_errors(trains[name], asked[name]) for name, spec in specs.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: every device that is present")
    parser.add_argument(
        "--paper", action="store_true", help="5,000 training samples and 500 queries instead of 2,000 and 100"
    )
    parser.add_argument("--k", type=int, nargs="+", help="default: 256 512 1024, with --paper 2048 4096 8192")
    parser.add_argument("--checkpoints", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch; processor time adds them up")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    n, m = (5000, 500) if arguments.paper else (2000, 100)
    sizes = arguments.k or ([2048, 4096, 8192] if arguments.paper else [256, 512, 1024])
    names = [arguments.device] if arguments.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    data, queries = digits(n, 1), digits(m, 2)
    report: list[dict[str, object]] = []
    for name in names:
        device = torch.device(name)
        label = torch.cuda.get_device_name() if name == "cuda" else f"{platform.processor() or platform.machine()}"
        print(
            f"{name} ({label}, {torch.get_num_threads()} threads): n_train {n}, n_query {m}, "
            f"{len(GRID)} dampings, seconds"
        )
        print(
            "    k system   cache  attribute 1/10  ratio all/attr  cholesky 1/10   eigh 1/10     float32 error "
            "(mask) at 1e-7, 1e-5, 0.1"
        )
        for k in sizes:
            try:
                row = measure(k, data, queries, arguments.checkpoints, device, arguments.repeats)
            except GrassError as error:
                raise SystemExit(str(error)) from error
            errors = row["float32_error"][f"random_mask-{k}"]
            shown = ["failed" if errors[key] is None else f"{errors[key]:.0e}" for key in ("1e-07", "1e-05", "0.1")]
            print(
                f"{k:5d} {row['system']:7s} {row['cache_seconds']:6.3f}  "
                f"{row['attribute_seconds_one']:6.3f} {row['attribute_seconds_ten']:6.3f}  "
                f"{row['ratio_cache_and_attribute']:6.2f} {row['ratio_attribute']:6.2f}  "
                f"{row['cholesky_seconds_one']:6.3f} {row['cholesky_seconds_ten']:6.3f}  "
                f"{row['eigh_seconds_one']:6.3f} {row['eigh_seconds_ten']:6.3f}  {', '.join(shown)}"
            )
            report.append({"device": name, "name": label, "n_train": n, "n_query": m, **row})
    if arguments.out:
        arguments.out.write_text(json.dumps({"torch": torch.__version__, "rows": report}, indent=2) + "\n")


if __name__ == "__main__":
    main()

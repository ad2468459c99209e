"""Caches random rows in a gradient store, then compares a streamed top-k with the disk's own reading speed.

    python benchmarks/store_stream.py [--folder runs/bench/store] [--samples 10000] [--layers 48] [--k 4096]
                                      [--dtype bfloat16]

The default is 3.9 GB of bfloat16: 10,000 samples, 48 layers of 4,096 features. Measured: seconds and peak host memory
of caching; (a) reading all files in order with one buffer; (b) the ten best and worst samples of 100 queries. Before
(a) and (b) the files are dropped from the page cache; /proc/self/io tells whether they came from the disk indeed. Both
are done ``--repeats`` times in turn; the least seconds count. Goals: (b) at least 0.6 of the speed of (a), memory under
2 GiB.
"""

import argparse
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.store import GradientStore
from grass_lib.store.formats import DTYPES, row_bytes

GOAL_RATIO, GOAL_BYTES = 0.6, 2 << 30
BLOCK = 8 << 20
FOUND = 10


class HostMemory:
    """Peak of the process's resident memory over that at the start of the block, sampled every 5 ms."""

    def __enter__(self) -> "HostMemory":
        self._start, self._end = self._now(), threading.Event()
        self.growth = 0
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._end.wait(0.005):
            self.growth = max(self.growth, self._now() - self._start)

    @staticmethod
    def _now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def random_rows(store: GradientStore, number: int) -> dict[str, Tensor]:
    """Rows of one shard: each layer's are those of the layer before, moved by one, since drawing takes long."""
    generator = torch.Generator().manual_seed(number)
    rows, widest = len(store.shard_rows(number)), max(store.layers.values())
    drawn = torch.empty(rows + len(store.layers), widest, dtype=store.row_dtype).normal_(generator=generator)
    return {name: drawn[place : place + rows, :k] for place, (name, k) in enumerate(store.layers.items())}


def cache(store: GradientStore) -> dict[str, float]:
    making, start = 0.0, time.perf_counter()
    with HostMemory() as memory, store.writer(max_pending=1) as writer:
        for number in store.missing():
            begin = time.perf_counter()
            rows = random_rows(store, number)
            making += time.perf_counter() - begin
            writer.submit(number, rows)
            del rows
    return {
        "seconds": time.perf_counter() - start,
        "seconds_of_making_rows": making,
        "peak_growth_bytes": memory.growth,
    }


def drop_cache(folder: Path) -> str:
    """Takes the files out of the page cache; says how."""
    os.sync()
    for path in sorted(folder.iterdir()):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1\n")
    except OSError:
        return "posix_fadvise"
    return "posix_fadvise and drop_caches"


def read_files(folder: Path) -> int:
    """(a) Every shard file in order, 8 MiB at a time into one buffer."""
    buffer, total = bytearray(BLOCK), 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def stream_only(store: GradientStore) -> int:
    """The stream with nothing computed, to tell its own cost from that of the scores."""
    return sum(rows.nbytes for _, _, rows in store.stream_rows())


def top_samples(store: GradientStore, queries: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """(b) Best and worst samples of each query, ``(2, n_query, 10)``; holds the scores of one shard at a time."""
    n_query = next(iter(queries.values())).shape[0]
    best = torch.full((2, n_query, FOUND), -torch.inf, device=device)
    indices = torch.full((2, n_query, FOUND), -1, device=device)
    scores, last = torch.empty(0), list(store.layers)[-1]
    for samples, name, rows in store.stream_rows():
        part = (queries[name] @ rows.to(device).decoded().T).float()
        scores = part if name == next(iter(store.layers)) else scores.add_(part)
        if name == last:
            there = torch.arange(samples.start, samples.stop, device=device).expand(n_query, -1)
            for side, signed in enumerate((scores, -scores)):
                all_scores = torch.cat([best[side], signed], dim=1)
                all_indices = torch.cat([indices[side], there], dim=1)
                best[side], chosen = all_scores.topk(FOUND, dim=1)
                indices[side] = all_indices.gather(1, chosen)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return indices, best


def disk_bytes() -> int:
    """Bytes that this process has had fetched from a disk so far; 0 where the system does not tell."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:
        return 0
    return int(dict(line.split(": ") for line in text.splitlines())["read_bytes"])


def measured(work: Callable[[], object], folder: Path, n_bytes: int) -> dict[str, Any]:
    how = drop_cache(folder)
    before, start, busy = disk_bytes(), time.perf_counter(), time.process_time()
    with HostMemory() as memory:
        work()
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "processor_seconds": time.process_time() - busy,
        "bytes_per_second": n_bytes / seconds,
        "disk_bytes": disk_bytes() - before,
        "peak_growth_bytes": memory.growth,
        "dropped_by": how,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/store"), help="made anew and removed again")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--shard", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES), help="of the stored rows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep", action="store_true", help="keep the folder, and use it where it is complete")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/store_stream.json"))
    options = parser.parse_args()
    device = torch.device(options.device)
    folder: Path = options.folder
    if folder.exists() and not options.keep:
        parser.error(f"{folder} exists; name another folder, or pass --keep to use it")

    store = GradientStore.create(
        folder,
        layers={f"layer.{index}": options.k for index in range(options.layers)},
        n_samples=options.samples,
        shard_size=options.shard,
        dtype=options.dtype,
        fingerprint={"benchmark": "store_stream"},
    )
    n_bytes = store.n_samples * sum(row_bytes(k, store.dtype) for k in store.layers.values())
    shard_bytes = n_bytes * min(options.shard, store.n_samples) // store.n_samples
    print(
        f"{n_bytes / 1e9:.2f} GB in {store.n_shards} shards of {shard_bytes / 1e6:.0f} MB, scores on {device}",
        flush=True,
    )
    result: dict[str, object] = {
        "samples": store.n_samples,
        "layers": options.layers,
        "k": options.k,
        "shard_size": store.shard_size,
        "dtype": options.dtype,
        "bytes": n_bytes,
        "queries": options.queries,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if store.missing():
        cached = cache(store)
        result["cache"] = cached
        print(
            f"cache      {cached['seconds']:8.1f} s, of which {cached['seconds_of_making_rows']:.1f} s made the rows; "
            f"peak memory +{cached['peak_growth_bytes'] / 2**30:.2f} GiB (goal under 2)",
            flush=True,
        )

    generator = torch.Generator().manual_seed(2**31)
    queries = {
        name: torch.randn(options.queries, k, generator=generator).to(device, store.row_dtype)
        for name, k in store.layers.items()
    }
    works: dict[str, Callable[[], object]] = {
        "disk": lambda: read_files(folder),
        "stream": lambda: stream_only(store),
        "topk": lambda: top_samples(store, queries, device),
    }
    # First use loads libraries and finds kernels, which is no matter of the disk.
    _ = next(iter(queries.values())) @ torch.zeros(options.k, options.shard, dtype=store.row_dtype, device=device)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in works}
    for _ in range(options.repeats):
        for name, work in works.items():
            runs[name].append(measured(work, folder, n_bytes))
    best = {name: min(lines, key=lambda line: line["seconds"]) for name, lines in runs.items()}
    for name, line in best.items():
        print(
            f"{name:10} {line['seconds']:8.1f} s  {line['bytes_per_second'] / 1e6:8.0f} MB/s  "
            f"from the disk {line['disk_bytes'] / 1e9:.2f} GB  peak memory +{line['peak_growth_bytes'] / 2**20:.0f} MiB"
        )
    least = min(line["disk_bytes"] for lines in runs.values() for line in lines)
    if least < 0.9 * n_bytes:
        print(
            f"only {least / n_bytes:.0%} of the bytes are known to come from the disk: speeds may be those of a cache"
        )
    ratio = best["disk"]["seconds"] / best["topk"]["seconds"]
    print(f"top-k runs at {ratio:.2f} of the disk's speed (goal {GOAL_RATIO})")
    result |= {"runs": runs, "ratio": ratio, "goal_ratio": GOAL_RATIO, "goal_bytes": GOAL_BYTES}
    result["ratios"] = [
        disk["seconds"] / topk["seconds"] for disk, topk in zip(runs["disk"], runs["topk"], strict=True)
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if not options.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

"""How smaller rows change scores: a store beside another one of the same samples, without the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from grass_lib.attribution.compress import layer_groups
from grass_lib.attribution.preconditioner import decompose
from grass_lib.attribution.scoring import device_rows
from grass_lib.baselines.crosscheck import spearman
from grass_lib.errors import UsageError
from grass_lib.precision import exact_products
from grass_lib.store import GradientStore
from grass_lib.store.formats import Rows
from grass_lib.store.shards import shard_parts


@dataclass(frozen=True)
class Comparison:
    """One store beside a reference.

    Attributes:
        dtype: Of the stored numbers.
        rank: Directions of each layer; None where rows are not coefficients of a basis.
        bytes_per_sample: Of a row of all layers in the shards, scales included.
        shared_bytes: Of the basis, once for all samples.
        ratio: Bytes per sample of the reference over those of this store.
        kept: Share of the rows' squared length that the basis holds; None without one.
        self_influence: Spearman correlation of self-influences with those of the reference.
        scores: Mean over queries of the Spearman correlation of scores.
        lowest: The lowest of them.
        queries: Number of queries.
        damping: Times the mean eigenvalue.
    """

    dtype: str
    rank: int | None
    bytes_per_sample: float
    shared_bytes: int
    ratio: float
    kept: float | None
    self_influence: float
    scores: float
    lowest: float
    queries: int
    damping: float

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def compare(
    reference: GradientStore,
    other: GradientStore,
    *,
    queries: int = 64,
    damping: float = 0.1,
    device: torch.device | None = None,
) -> Comparison:
    """Compares influence scores of two finished stores; queries are training samples, evenly spaced.

    A query's gradient is never rounded in use, so both are asked with the rows of the reference.

    Args:
        reference: Usually of float32 rows.
        other: Of the same samples and gradients.
        queries: How many, at most all samples.
        damping: Times the mean eigenvalue.
        device: Where to compute; None for the CPU.

    Raises:
        UsageError: The stores are not of the same samples and layers, or an argument is out of range.
        StoreError: A shard is missing or damaged.
    """
    check_same(reference, other)
    if not 1 <= queries <= reference.n_samples:
        raise UsageError(f"queries is {queries}; expected between 1 and the number of samples, {reference.n_samples}")
    if not damping > 0:
        raise UsageError(f"damping is {damping}; expected a number above 0")
    place = torch.device("cpu") if device is None else device
    asked = torch.arange(queries) * reference.n_samples // queries
    own, found = (_scores(store, reference, asked, damping, place) for store in (reference, other))
    agreement = spearman(own[0], found[0])
    basis, bytes_of = other.basis, sample_bytes(other)
    return Comparison(
        dtype=other.manifest.dtype_name,
        rank=other.manifest.low_rank["rank"] if other.manifest.low_rank else None,
        bytes_per_sample=bytes_of,
        shared_bytes=len(basis.to_bytes()) if basis else 0,
        ratio=sample_bytes(reference) / bytes_of,
        kept=_kept(other),
        self_influence=float(spearman(own[1][:, None], found[1][:, None])),
        scores=float(agreement.mean()),
        lowest=float(agreement.min()),
        queries=queries,
        damping=damping,
    )


def check_same(reference: GradientStore, other: GradientStore) -> None:
    """Refuses stores of different samples or layers, or of rows that do not come from the same gradients.

    Raises:
        UsageError: They differ; both values are shown.
    """
    one, two = reference.manifest, other.manifest
    if one.low_rank:
        raise UsageError(
            f"{reference.path} has coefficients for rows; expected whole rows, best float32, to compare to"
        )
    names = ("n_samples", "features")
    differing = [f"{name} {getattr(one, name)} and {getattr(two, name)}" for name in names if _differ(one, two, name)]
    prints = [{k: v for k, v in each.fingerprint.items() if k != "compressed"} for each in (one, two)]
    differing += [
        f"{name} {prints[0].get(name)} and {prints[1].get(name)}"
        for name in {**prints[0], **prints[1]}
        if prints[0].get(name) != prints[1].get(name)
    ]
    if differing:
        raise UsageError(f"{reference.path} and {other.path} are not of the same gradients: {'; '.join(differing)}")


def sample_bytes(store: GradientStore) -> float:
    """Bytes of a sample in the shards of a store: numbers and scales, without headers and notes."""
    total = sum(part.size for number in range(store.n_shards) for part in shard_parts(store.manifest, number)[1])
    return total / store.n_samples


def _differ(one: Any, two: Any, name: str) -> bool:
    return getattr(one, name) != getattr(two, name)


def _kept(store: GradientStore) -> float | None:
    """Share of the squared length of whole rows, all layers together."""
    basis = store.basis
    if basis is None:
        return None
    total = {name: mean * store.features[name] for name, mean in basis.means.items()}
    whole = sum(total.values())
    return sum(total[name] * basis.kept[name] for name in total) / whole if whole else 1.0


def _scores(
    store: GradientStore, reference: GradientStore, asked: Tensor, damping: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scores ``(n, m)`` and self-influences ``(n,)``, a few layers at a time."""
    scores = torch.zeros(store.n_samples, len(asked), device=device)
    own = torch.zeros(store.n_samples, device=device)
    for names in layer_groups(store):
        queries = {name: torch.empty(len(asked), reference.layers[name], device=device) for name in names}
        for samples, name, rows in reference.stream_rows(layers=names):
            for position, row in _chosen(samples, rows, asked):
                queries[name][position] = row.to(device)
        with exact_products():
            bases = decompose(store, names, None, device, solve=torch.float64, keep=torch.float32)
            for name, basis in bases.items():
                reduced = queries[name] if store.basis is None else store.basis.reduce(name, queries[name])
                queries[name] = basis.precondition(reduced, [damping])[0]
            for samples, name, rows in store.stream_rows(layers=names):
                for part, values in device_rows(rows, torch.float32, device):
                    place = slice(samples.start + part.start, samples.start + part.stop)
                    scores[place].addmm_(values, queries[name].mT)
                    own[place] += bases[name].self_influence(values, [damping])[0]
    return scores, own


def _chosen(samples: range, rows: Rows, asked: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Positions among the queries, and the rows, of those that are in a shard."""
    for position, sample in enumerate(asked.tolist()):
        if sample in samples:
            place = sample - samples.start
            yield position, rows.part(slice(place, place + 1)).decoded()[0].float()

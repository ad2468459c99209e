"""Row i belongs to sample i: checks that a loader yields the same samples in the same order on every walk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from grass_lib.errors import UsageError
from grass_lib.gradients.full import batch_size
from grass_lib.gradients.outputs import Batch

logger = logging.getLogger(__name__)

SPREAD = 64
"""Samples of a training set that stand for all of it."""
_SIZE = " of "
_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def check_order(loader: Iterable[Batch], *, every_sample: bool = True, shared: bool = False) -> None:
    """Refuses loaders whose order changes, or that leave samples out.

    Args:
        loader: Yields batches.
        every_sample: Whether the last short batch has to be there.
        shared: Whether several ranks walk over the same samples, and take their parts by themselves.

    Raises:
        UsageError: A sampler of the loader shuffles, is one of several ranks' or drops the last short batch.
    """
    plain = isinstance(loader, list | tuple) and len(loader) > 0 and all(isinstance(part, Tensor) for part in loader)
    if plain or isinstance(loader, Tensor | Mapping):
        raise UsageError(
            f"the loader is a {type(loader).__name__}, a batch itself; expected what yields batches: a DataLoader, "
            "or a list of batches"
        )
    batches = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
        name = type(sampler).__name__
        if isinstance(sampler, _SHUFFLING) or (isinstance(sampler, DistributedSampler) and sampler.shuffle):
            raise UsageError(
                f"the loader shuffles ({name}), and row i must belong to sample i on every walk; use shuffle=False"
            )
        if shared and isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
            raise UsageError(
                f"the loader yields the part of rank {sampler.rank} of {sampler.num_replicas} ({name}); expected all "
                "samples on every rank, which take their parts by themselves"
            )
    drops = getattr(loader, "drop_last", False) or (isinstance(batches, BatchSampler) and batches.drop_last)
    if every_sample and drops:
        raise UsageError("the loader drops the last short batch, and every sample needs a row; use drop_last=False")


def sample_sha256(batch: Batch, place: int = 0) -> str:
    """SHA-256 of one sample of a batch, without the tokens that an ``attention_mask`` leaves out.

    Args:
        batch: Tuple or dict of tensors with samples on dimension 0.
        place: Which one.

    Returns:
        64 hexadecimal digits; behind them the size of the batch where the sample may be padded to its longest one and
        nothing says how far.
    """
    digest, size = hashlib.sha256(), 0
    parts = dict(batch.items() if isinstance(batch, Mapping) else enumerate(batch))
    rows = {str(name): values for name, values in parts.items() if isinstance(values, Tensor) and values.dim()}
    samples = {name: values[place] for name, values in rows.items() if len(values)}
    mask = samples.get("attention_mask")
    for name in sorted(samples):
        sample = samples[name].detach()
        if mask is not None and mask.dim() == 1 and sample.shape == mask.shape:
            sample = sample[mask != 0]  # whatever the batch is padded to
        elif sample.dim() == 1 and not sample.is_floating_point():
            size = max(map(len, rows.values()))
        digest.update(f"{name} {sample.dtype} {tuple(sample.shape)}\n".encode())
        digest.update(sample.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return _with_size(digest.hexdigest(), size)


def spread_sha256(loader: Iterable[Batch]) -> str:
    """SHA-256 of 64 samples from the first to the last one, read at their places beside the loader's own walk.

    Args:
        loader: A list of batches, or a ``DataLoader`` in the order of its data set.

    Returns:
        As `sample_sha256`; empty where samples cannot be read at their places.
    """
    try:
        found = [sample_sha256(*at) for at in _spread(loader.loader if isinstance(loader, WatchedLoader) else loader)]
    except Exception:  # a data set may be made for its loader's workers only, or for one walk
        logger.debug("samples could not be read at their places", exc_info=True)
        return ""
    if not found:
        return ""
    parts = [one.partition(_SIZE) for one in found]
    digest = hashlib.sha256("".join(digest for digest, *_ in parts).encode())
    return _with_size(digest.hexdigest(), sum(int(size or 0) for *_, size in parts))


def _with_size(digest: str, size: int) -> str:
    return digest + (f"{_SIZE}{size}" if size else "")


def _spread(loader: Any) -> Iterator[tuple[Batch, int]]:
    """Batches and the places of samples in them."""
    if type(loader) in (list, tuple):  # what a class of its own yields may be something else
        ends = list(accumulate(batch_size(batch) for batch in loader))
        for place in _places(ends[-1] if ends else 0):
            number = next(number for number, end in enumerate(ends) if place < end)
            yield loader[number], place - ends[number] + batch_size(loader[number])
    elif (
        isinstance(loader, DataLoader)
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.batch_sampler.sampler) is SequentialSampler
        and not isinstance(loader.dataset, IterableDataset)
    ):
        for place in _places(len(loader.dataset)):  # pyright: ignore[reportArgumentType]
            batch: Any = loader.collate_fn([loader.dataset[place]])
            yield batch, 0


def _places(count: int) -> list[int]:
    return sorted({round(step * (count - 1) / (SPREAD - 1)) for step in range(SPREAD)}) if count else []


def may_be_same(one: str, other: str) -> bool:
    """Whether two results of `sample_sha256` can be those of the same sample: padded otherwise, nobody knows."""
    sizes = one.partition(_SIZE)[2], other.partition(_SIZE)[2]
    return one == other or (all(sizes) and sizes[0] != sizes[1])


class WatchedLoader:
    """A loader that compares the first sample of every walk with that of the first one.

    Attributes:
        yielded: Whether the present walk has yielded anything.
    """

    def __init__(self, loader: Iterable[Batch]) -> None:
        """Takes the loader; its attributes are those of this one."""
        self.loader = loader
        self.yielded = False
        self._first: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Batch]:
        """Walks over the loader.

        Raises:
            UsageError: The first sample is not that of the walk before.
        """
        self.yielded = False
        for batch in self.loader:
            if not self.yielded:
                found, self.yielded = sample_sha256(batch), True
                if self._first not in (None, found):
                    raise UsageError(
                        "the loader's first sample differs from that of the walk before; expected the same samples in "
                        "the same order on every walk, without shuffling and without random augmentation"
                    )
                self._first = found
            yield batch

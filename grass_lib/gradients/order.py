"""Row i belongs to sample i: checks that a loader yields the same samples in the same order on every walk."""

from __future__ import annotations

import bisect
import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, TypeAlias, cast

import numpy as np
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
from grass_lib.gradients.graph import shapes_of
from grass_lib.gradients.outputs import Batch

logger = logging.getLogger(__name__)

SPREAD = 64
"""Samples of a training set that stand for all of it."""
_AGAIN = 16  # every so many of them are read twice
_SIZE = " of "
_Reader: TypeAlias = Callable[[int], tuple[Batch, int]]
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
    return digest.hexdigest() + (f"{_SIZE}{size}" if size else "")


def spread_sha256(loader: Iterable[Batch]) -> str:
    """SHA-256 of 64 samples from the first to the last one, read at their places beside the loader's own walk.

    Random numbers are drawn from where they were before.

    Args:
        loader: A list of batches, or a ``DataLoader`` without workers in the order of its data set.

    Returns:
        64 hexadecimal digits, and behind them how they were read (of a list, also the shapes, since batches may be
        padded otherwise); empty where samples cannot be read at their places, or are others at the next reading.
    """
    loader = loader.loader if isinstance(loader, WatchedLoader) else loader
    listed = type(loader) in (list, tuple)  # what a class of its own yields may be something else
    state, random_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        read = _reader_of_list(loader) if listed else _reader_of_loader(loader)
        if read is None:
            return ""
        count, at = read
        places = _places(count)
        found = [sample_sha256(*at(place)) for place in places]
        again = [sample_sha256(*at(place)) for place in places[::_AGAIN]]
        shapes = [[part[1][1:] for part in shapes_of(at(place)[0])] for place in places] if listed else []
    except Exception:  # a data set may be made for one walk only
        logger.debug("samples could not be read at their places", exc_info=True)
        return ""
    finally:
        torch.set_rng_state(state)
        random.setstate(random_state)
        np.random.set_state(numpy_state)
    if not found or found[::_AGAIN] != again:
        return ""
    digest = hashlib.sha256("".join(one.partition(_SIZE)[0] for one in found).encode())
    how = f"batches {hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]}" if listed else "samples"
    return f"{digest.hexdigest()}{_SIZE}{how}"


def _reader_of_list(batches: Any) -> tuple[int, _Reader]:
    """Number of samples, and what gives a sample's batch and its place there."""
    ends = list(accumulate(batch_size(batch) for batch in batches))

    def at(place: int) -> tuple[Batch, int]:
        number = bisect.bisect_right(ends, place)
        return batches[number], place - (ends[number - 1] if number else 0)

    return ends[-1] if ends else 0, at


def _reader_of_loader(loader: Any) -> tuple[int, _Reader] | None:
    """As `_reader_of_list`; None where samples have no places, or are read by workers: files opened here are theirs."""
    if not isinstance(loader, DataLoader) or loader.num_workers or isinstance(loader.dataset, IterableDataset):
        return None
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler or type(batches.sampler) is not SequentialSampler:
        return None
    data, collate = cast("Any", loader.dataset), cast("Any", loader.collate_fn)
    return len(data), lambda place: (collate([data[place]]), 0)


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

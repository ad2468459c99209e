"""Loaders whose order changes are refused, whoever shuffles; the first sample tells data sets apart."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from grass_lib.errors import UsageError
from grass_lib.gradients.order import SPREAD, WatchedLoader, check_order, may_be_same, sample_sha256, spread_sha256
from grass_lib.gradients.stream import sample_count

DATA = TensorDataset(torch.arange(12.0).view(6, 2), torch.arange(6))


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True},
        {"sampler": SubsetRandomSampler([0, 1, 2])},
        {"sampler": WeightedRandomSampler([1.0] * 6, 6)},
        {"batch_sampler": BatchSampler(RandomSampler(DATA), 2, drop_last=False)},
        {"sampler": DistributedSampler(DATA, num_replicas=1, rank=0, shuffle=True)},
    ],
)
def test_shuffling_is_refused(options):
    size = {} if "batch_sampler" in options else {"batch_size": 2}
    with pytest.raises(UsageError, match="shuffle=False"):
        check_order(DataLoader(DATA, **options, **size))


def test_samples_left_out_are_refused():
    for loader in (
        DataLoader(DATA, batch_size=4, drop_last=True),
        DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 4, drop_last=True)),
    ):
        with pytest.raises(UsageError, match="drop_last=False"):
            check_order(loader)
        check_order(loader, every_sample=False)
    part = DataLoader(DATA, batch_size=2, sampler=DistributedSampler(DATA, num_replicas=2, rank=1, shuffle=False))
    check_order(part)  # a process may ask for its own part
    with pytest.raises(UsageError, match="rank 1 of 2"):
        check_order(part, shared=True)


def test_a_fixed_order_is_taken():
    for loader in (
        DataLoader(DATA, batch_size=2),
        DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 2, drop_last=False)),
        [next(iter(DataLoader(DATA, batch_size=2)))],
        (batch for batch in DataLoader(DATA, batch_size=2)),
    ):
        check_order(loader)


def test_padding_does_not_count():
    def text(ids, mask):
        ids = torch.tensor([ids, ids[::-1]])
        return {"input_ids": ids, "attention_mask": torch.tensor([mask, mask]), "labels": ids}

    plain = text([5, 6], [1, 1])
    alike = plain, text([5, 6, 0, 0], [1, 1, 0, 0]), text([0, 5, 6], [0, 1, 1])
    assert len({sample_sha256(batch) for batch in alike}) == 1
    ids = plain["input_ids"]
    others = text([5, 7], [1, 1]), {"input_ids": ids}, {"labels": ids}, (ids,), (ids.int(),), (ids.float(),)
    images = torch.zeros(2, 1, 2, 3)
    others += (images,), (images.view(2, 1, 3, 2),)
    assert len({sample_sha256(batch) for batch in (plain, *others)}) == 9
    assert sample_sha256({"x": images, "t": torch.tensor(1.0)}) == sample_sha256({"x": images})
    assert len(sample_sha256((torch.zeros(2, 0), torch.zeros(2, dtype=torch.bool)))) == 64
    # Without a mask nobody knows: batches of other sizes may be padded otherwise.
    ids, longer = torch.tensor([[5, 6], [1, 2]]), torch.tensor([[5, 6, 0], [1, 2, 0], [1, 2, 3]])
    one, other = (sample_sha256({"input_ids": batch}) for batch in (ids, longer))
    assert one != other
    assert may_be_same(one, other)
    assert not may_be_same(one, sample_sha256({"input_ids": ids + 1}))
    assert not may_be_same(sample_sha256((images,)), sample_sha256((images[:1] + 1,)))


def test_every_walk_begins_with_the_same_sample():
    batches = [(torch.arange(4.0).view(2, 2),)]
    watched = WatchedLoader(batches)
    assert sample_count(watched) == 2
    assert sample_count(WatchedLoader(DataLoader(DATA, batch_size=4))) == 6
    for _ in range(2):
        assert len(list(watched)) == 1
    batches[0] = (torch.ones(2, 2),)
    with pytest.raises(UsageError, match="random augmentation"):
        list(watched)
    once = WatchedLoader(iter([(torch.ones(1),)]))
    assert (len(list(once)), once.yielded) == (1, True)
    assert (len(list(once)), once.yielded) == (0, False)


def test_samples_from_the_first_to_the_last_tell_data_sets_apart():
    x, y = torch.arange(2000.0).view(1000, 2), torch.arange(1000) % 7

    def found(x, y, size):
        data = TensorDataset(x, y)
        batches = [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]
        assert spread_sha256(batches) == spread_sha256(WatchedLoader(batches))
        return spread_sha256(DataLoader(data, batch_size=size)), spread_sha256(batches)

    known = found(x, y, 16)
    assert known == found(x, y, 7)  # however they are cut into batches
    assert may_be_same(*known)  # which of them is padded is not known
    places = {round(step * 999 / (SPREAD - 1)) for step in range(SPREAD)}
    for place in range(0, 1000, 9):
        others = found(x, torch.where(torch.arange(1000) == place, 8, y), 16)
        assert [not may_be_same(*pair) for pair in zip(known, others, strict=True)] == [place in places] * 2
    last = y.clone()
    last[-1] += 1
    assert found(x, last, 16) != known
    assert found(x[:3], y[:3], 2) != found(x[:3], y[:3].flip(0), 2)


def test_padding_of_lists_of_batches_is_not_known():
    ids = torch.arange(12).view(4, 3)
    padded = [{"input_ids": ids[:3]}, {"input_ids": torch.nn.functional.pad(ids[3:], (0, 2))}]
    one, other = spread_sha256([{"input_ids": ids}]), spread_sha256(padded)
    assert one != other
    assert may_be_same(one, other)
    assert not may_be_same(one, spread_sha256([{"input_ids": ids + 1}]))


def test_padding_of_sounds_is_not_known():
    sounds = [torch.randn(length) for length in range(3, 15)]
    pad = torch.nn.utils.rnn.pad_sequence
    lists = [
        [(pad(sounds[i : i + size], batch_first=True), torch.arange(12)[i : i + size]) for i in range(0, 12, size)]
        for size in (2, 4)
    ]
    one, other = map(spread_sha256, lists)
    assert one != other
    assert may_be_same(one, other)
    louder = [(2 * x, y) for x, y in lists[0]]
    assert not may_be_same(one, spread_sha256(louder))


class Noisy(TensorDataset):
    """Changes at every reading, by the generators of PyTorch, Python and NumPy."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand(()) + random.random() + np.random.rand(), y


def test_reading_samples_leaves_random_numbers_as_they_were():
    def drawn():
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        loader = DataLoader(Noisy(*DATA.tensors), batch_size=2)
        return loader, lambda: torch.cat([x for x, _ in loader])

    _, walk = drawn()
    wanted = walk()
    loader, walk = drawn()
    assert spread_sha256(loader) == ""  # it is other samples at every reading
    assert torch.equal(walk(), wanted)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATA)


class OfWorkers(TensorDataset):
    def __getitem__(self, index):
        raise RuntimeError("opened in a worker")


@pytest.mark.parametrize(
    "loader",
    [
        iter([(torch.ones(2, 2),)]),
        [],
        DataLoader(Stream(), batch_size=2),
        DataLoader(DATA, batch_size=2, sampler=[5, 4, 3, 2, 1, 0]),
        DataLoader(DATA, batch_size=None),
        DataLoader(OfWorkers(*DATA.tensors), batch_size=2),
        DataLoader(DATA, batch_size=2, num_workers=1),  # what is opened by a reading here would be the workers' too
    ],
)
def test_samples_that_cannot_be_read_at_their_places_say_nothing(loader):
    assert spread_sha256(loader) == ""


@pytest.mark.parametrize("batch", [DATA.tensors, list(DATA.tensors), dict(enumerate(DATA.tensors)), DATA.tensors[0]])
def test_a_batch_is_no_loader(batch):
    with pytest.raises(UsageError, match="a batch itself; expected what yields batches"):
        check_order(batch)

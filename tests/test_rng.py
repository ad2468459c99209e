"""Random streams: published vectors, an independent implementation, slices, and distributions."""

import itertools
import math

import philox_reference as reference
import pytest
import torch

from grass_lib.errors import UsageError
from grass_lib.rng import Stream, philox_

ALL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ALL, ALL, ALL, ALL), (ALL, ALL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_vectors(counter, key, expected):
    """The known answers that come with the Random123 library."""
    assert reference.philox(counter, key) == expected
    tensors = tuple(torch.full((3,), word) for word in counter)
    philox_(tensors, key)
    for tensor, word in zip(tensors, expected, strict=True):
        assert tensor.tolist() == [word] * 3


def test_key_and_words_from_scratch():
    stream = Stream(7, 'a "layer"', "projection", 3)
    key = reference.stream_key(7, 'a \\"layer\\"', "projection", 3)
    assert stream.key == key
    rows, columns = torch.tensor([[0], [5], [ALL]]), torch.tensor([0, 1, 77])
    words = stream.words(rows, columns, 2, 9)
    assert words.shape == (3, 3, 4)
    for i, j in itertools.product(range(3), range(3)):
        assert tuple(words[i, j].tolist()) == reference.philox((int(rows[i]), int(columns[j]), 2, 9), key)


def test_streams_with_other_names_differ():
    streams = [
        Stream(0),
        Stream(1),
        Stream(0, "a"),
        Stream(0, "", "a"),
        Stream(0, checkpoint=1),
        Stream(0, "a", "b"),
        Stream(0, "ab"),
        Stream(0, '","'),
        Stream(-1),
    ]
    assert len({stream.key for stream in streams}) == len(streams)


def test_helpers_of_one_stream_do_not_share_words():
    stream = Stream(0)
    uniform = (stream.uniform(64, dtype=torch.float64) * 2**32).long()
    assert not torch.equal(uniform, stream.words(torch.arange(16)).reshape(-1))
    assert not torch.equal(uniform, stream.integers(2**32, 64))


def test_chunking_changes_nothing():
    stream = Stream(3, "x")
    counters = torch.arange(70_000)
    whole = stream.words(counters)
    assert torch.equal(whole[65_500:65_600], stream.words(counters[65_500:65_600]))


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 7, 8, 13])
def test_any_slice_alone(offset):
    stream = Stream(11, "slice")
    draws = {
        "uniform": stream.uniform,
        "normal": stream.normal,
        "integers": lambda n, offset=0: stream.integers(10, n, offset=offset),
        "keep": lambda n, offset=0: stream.keep_mask(n, 0.3, offset=offset),
    }
    for name, draw in draws.items():
        assert torch.equal(draw(60)[offset : offset + 21], draw(21, offset=offset)), name
        assert torch.equal(draw((3, 7), offset=offset).reshape(-1), draw(21, offset=offset)), name
        assert draw((0, 4)).shape == (0, 4)


def test_offset_beyond_32_bits():
    stream, offset = Stream(0), 2**36 + 5
    call = offset // 4
    words = reference.philox((call & ALL, 0, call >> 32, 1), stream.key)
    assert int(stream.uniform(1, offset=offset, dtype=torch.float64) * 2**32) == words[offset % 4]


def test_helper_values_from_scratch():
    stream = Stream(5, "helpers")
    calls = [[reference.philox((q, 0, 0, tag), stream.key) for q in range(4)] for tag in range(7)]
    flat = [list(itertools.chain.from_iterable(words)) for words in calls]
    assert stream.uniform(16, dtype=torch.float64).tolist() == [word / 2**32 for word in flat[1]]
    assert stream.uniform(16).tolist() == [(word >> 8) / 2**24 for word in flat[1]]
    assert stream.integers(1000, 16).tolist() == [word * 1000 >> 32 for word in flat[3]]
    halves = list(itertools.chain.from_iterable((word & 0xFFFF, word >> 16) for word in flat[6]))
    assert stream.keep_mask(32, 0.25).tolist() == [half >= 2**14 for half in halves]
    expected = [
        value for a, b, c, d in calls[2] for value in (*reference.normal_pair(a, b), *reference.normal_pair(c, d))
    ]
    assert stream.normal(16, dtype=torch.float64).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert stream.normal(16).tolist() == pytest.approx(expected, rel=1e-5, abs=2e-6)


def test_distributions():
    stream, n = Stream(1, "moments"), 200_000
    uniform, normal = stream.uniform(n, dtype=torch.float64), stream.normal(n, dtype=torch.float64)
    assert abs(uniform.mean() - 0.5) < 5 / math.sqrt(12 * n)
    assert abs(normal.mean()) < 5 / math.sqrt(n)
    assert abs(normal.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((normal**4).mean() - 3) < 5 * math.sqrt(96 / n)
    for lag in (1, 2, 3, 4):
        assert abs((normal[lag:] * normal[:-lag]).mean()) < 5 / math.sqrt(n)
    counts = torch.bincount(stream.integers(10, n), minlength=10).double()
    assert ((counts - n / 10) ** 2 / (n / 10)).sum() < 40  # chi-square with 9 degrees of freedom
    keep = stream.keep_mask(n, 0.1).double()
    assert abs(keep.mean() - 0.9) < 5 * math.sqrt(0.09 / n)


def test_keep_mask_limits():
    assert Stream(0).keep_mask(100, 0.0).all()
    assert not Stream(0).keep_mask(100, 1.0).any()


@pytest.mark.parametrize(("k", "p"), [(0, 0), (0, 9), (1, 1), (3, 9), (5, 9), (8, 9), (9, 9), (50, 101), (1000, 1500)])
def test_distinct_is_a_set(k, p):
    chosen = Stream(2, "set").distinct(k, p)
    assert chosen.shape == (k,)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert k == 0 or (chosen[0] >= 0 and chosen[-1] < p)


@pytest.mark.parametrize(("k", "p"), [(7, 40), (33, 40), (3, 2**32), (20, 1_000_003)])
def test_distinct_from_scratch(k, p):
    """First distinct values of the 64-bit sequence, or what they leave."""
    stream, wanted, found = Stream(4, "scratch"), min(k, p - k), []
    for call in itertools.count():
        words = reference.philox((call, 0, 0, 4), stream.key)
        for high, low in (words[:2], words[2:]):
            value = (high * 2**32 + low) * p >> 64
            if len(found) < wanted and value not in found:
                found.append(value)
        if len(found) == wanted:
            break
    expected = sorted(found) if k == wanted else sorted(set(range(p)) - set(found))
    assert stream.distinct(k, p).tolist() == expected


def test_distinct_makes_no_table_of_the_range():
    """2**32 flags would take 4 GB and many seconds."""
    chosen = Stream(0).distinct(64, 2**32)
    assert chosen.unique().numel() == 64
    assert chosen.max() > 2**31


def test_distinct_is_uniform_over_sets():
    p, k, n = 6, 2, 1500
    sets = list(itertools.combinations(range(p), k))
    counts = dict.fromkeys(sets, 0)
    for seed in range(n):
        counts[tuple(Stream(seed).distinct(k, p).tolist())] += 1
    expected = n / len(sets)
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 45  # 14 degrees of freedom


def test_permutations():
    stream = Stream(0, "order")
    orders = [tuple(stream.permutation(50, index=index).tolist()) for index in range(4)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == 4
    keys = [
        key
        for call in range(3)
        for words in [reference.philox((call, 2, 0, 5), stream.key)]
        for key in (words[0] * 2**32 + words[1], words[2] * 2**32 + words[3])
    ][:5]
    signed = [key - 2**64 if key >= 2**63 else key for key in keys]
    assert stream.permutation(5, index=2).tolist() == sorted(range(5), key=signed.__getitem__)
    assert stream.permutation(0).tolist() == []


def test_permutation_positions_are_uniform():
    n, draws = 5, 1000
    stream, counts = Stream(9), torch.zeros(n, n)
    for index in range(draws):
        counts[torch.arange(n), stream.permutation(n, index=index)] += 1
    assert ((counts - draws / n).abs() < 5 * math.sqrt(draws / n)).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: Stream("0"),
        lambda: Stream(True),
        lambda: Stream(0, 1),
        lambda: Stream(0, "", None),
        lambda: Stream(0, checkpoint=-1),
        lambda: Stream(0, checkpoint=1.0),
        lambda: Stream(0).uniform(3, offset=-1),
        lambda: Stream(0).integers(0, 3),
        lambda: Stream(0).integers(2**32 + 1, 3),
        lambda: Stream(0).distinct(3, 2),
        lambda: Stream(0).distinct(-1, 2),
        lambda: Stream(0).distinct(1, 2**32 + 1),
        lambda: Stream(0).keep_mask(3, 1.5),
        lambda: Stream(0).keep_mask(3, float("nan")),
        lambda: Stream(0).permutation(-1),
        lambda: Stream(0).permutation(3, index=-1),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(UsageError, match="expected"):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_same_integers_on_the_gpu():
    stream, n = Stream(0, "gpu"), 100_003
    counters = torch.arange(n)
    assert torch.equal(stream.words(counters, 3), stream.words(counters.cuda(), 3).cpu())
    assert torch.equal(stream.uniform(n), stream.uniform(n, device="cuda").cpu())
    assert torch.equal(stream.keep_mask(n, 0.1), stream.keep_mask(n, 0.1, device="cuda").cpu())
    assert torch.equal(stream.permutation(n), stream.permutation(n, device="cuda").cpu())
    for k, p in ((100, 2**32), (1000, 1999), (1000, 1001)):
        assert torch.equal(stream.distinct(k, p), stream.distinct(k, p, device="cuda").cpu())
    torch.testing.assert_close(stream.normal(n), stream.normal(n, device="cuda").cpu(), rtol=1e-4, atol=1e-5)

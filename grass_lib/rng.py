"""Counter-based random streams: the same numbers on every device, in any order, from any slice.

A stream is named by what it is for, not by when it is drawn: ``Stream(seed, name, stage, checkpoint)``. Its key is a
hash of that name; its words come from Philox-4x32-10 (Salmon et al. 2011), a function from a 128-bit counter to four
32-bit words. Any part of a stream can therefore be computed alone, and nothing depends on batch size, chunking, the
order of layers or the number of workers.

Layout of the counter, part of the stream's version:

==================  =======================  ========================================================================
numbers             counter (c0, c1)         use of the four words
==================  =======================  ========================================================================
uniform, integers   (i // 4, 0)              number i from word i % 4
keep_mask           (i // 8, 0)              number i from a 16-bit half: word (i % 8) // 2, low half first
keys, 64 bits       (i // 2, 0)              key i from words 2 (i % 2) (high) and 2 (i % 2) + 1 (low)
normal matrix       (row, column // 4)       columns 4q to 4q + 3 by two Box-Muller pairs
sign matrix         (row, column // 128)     column's sign from bit column % 32 of word (column % 128) // 32
sparse column       (column, nonzero)        index from word 0, sign from the lowest bit of word 1
==================  =======================  ========================================================================

The first counter fills the low 64 bits of the 128, the second the high 64.
"""

import hashlib
import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.errors import UsageError

STREAM_VERSION = 1
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# Counters per block. On a CPU: small enough for the cache, and not above the size from which torch hands elementwise
# work to several threads, which costs more than such short operations gain.
_CPU_BLOCK = 1 << 15
_CUDA_BLOCK = 1 << 24


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Args:
        counter: Four int64 tensors of one shape with values in [0, 2^32).
        key: Two numbers in [0, 2^32).

    Returns:
        Four int64 tensors of that shape with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Int64 products wrap around, which keeps all 64 bits of a product of two 32-bit numbers. Bits above the low 32
        # are only cleared where a product needs it.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


@dataclass(frozen=True)
class Stream:
    """One named stream of random numbers.

    Attributes:
        seed: The user's seed.
        name: What the stream belongs to, for example a layer's name.
        stage: What it is for, for example ``"sparsification"`` or ``"projection"``.
        checkpoint: Number of the checkpoint, so that an ensemble draws independent projections.
    """

    seed: int
    name: str = ""
    stage: str = ""
    checkpoint: int = 0

    def __post_init__(self) -> None:
        for field in ("seed", "checkpoint"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise UsageError(f"{field} is {value!r}; expected an integer.")

    @property
    def key(self) -> tuple[int, int]:
        """The first 64 bits of BLAKE2b over the stream's name, as two 32-bit numbers."""
        text = json.dumps([STREAM_VERSION, self.seed, self.name, self.stage, self.checkpoint], separators=(",", ":"))
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def words(self, low: Tensor, high: Tensor | int = 0) -> Tensor:
        """The four words at each counter.

        Args:
            low: Low 64 bits of the counters, int64, any shape.
            high: High 64 bits, a tensor that broadcasts against ``low`` or a number.

        Returns:
            int64 tensor of the broadcast shape plus a last dimension of 4, values in [0, 2^32).
        """
        if not isinstance(high, Tensor):
            high = torch.tensor(high, dtype=torch.int64, device=low.device)
        low, high = torch.broadcast_tensors(low, high)
        shape = low.shape
        low, high = low.reshape(-1), high.reshape(-1)
        out = torch.empty(len(low), 4, dtype=torch.int64, device=low.device)
        block = _CPU_BLOCK if low.device.type == "cpu" else _CUDA_BLOCK
        for start in range(0, len(low), block):
            part, top = low[start : start + block], high[start : start + block]
            counter = (part & _MASK, (part >> 32) & _MASK, top & _MASK, (top >> 32) & _MASK)
            for column, word in enumerate(philox(counter, self.key)):
                out[start : start + block, column] = word
        return out.reshape(*shape, 4)

    def integers(self, n: int, *, offset: int = 0, device: str | torch.device = "cpu") -> Tensor:
        """Numbers ``offset .. offset + n - 1`` of the stream: ``(n,)`` int64, uniform in [0, 2^32)."""
        first, last = offset // 4, -(-(offset + n) // 4)
        words = self.words(torch.arange(first, last, device=device)).reshape(-1)
        return words[offset - 4 * first : offset - 4 * first + n]

    def uniform(self, n: int, *, offset: int = 0, device: str | torch.device = "cpu") -> Tensor:
        """``(n,)`` float32, uniform in [0, 1) with 24 random bits."""
        return (self.integers(n, offset=offset, device=device) >> 8).to(torch.float32) * 2.0**-24

    def keep_mask(
        self, shape: tuple[int, ...], drop_probability: float, *, offset: int = 0, device: str | torch.device = "cpu"
    ) -> Tensor:
        """A boolean mask that is False with the given probability, exact to 2^-16 (dropout).

        Args:
            shape: Of the mask; its elements are numbers ``offset`` onwards of the stream, in row-major order.
            drop_probability: In [0, 1].
            offset: Where to start.
            device: Where the mask is made.
        """
        if not 0.0 <= drop_probability <= 1.0:
            raise UsageError(f"drop_probability is {drop_probability}; expected a number from 0 to 1.")
        n = math.prod(shape)
        first, last = offset // 8, -(-(offset + n) // 8)
        words = self.words(torch.arange(first, last, device=device))
        halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(-1)
        return (halves[offset - 8 * first : offset - 8 * first + n] >= round(drop_probability * 65536)).reshape(shape)

    def keys(self, n: int, *, offset: int = 0, device: str | torch.device = "cpu") -> Tensor:
        """``(n,)`` int64 with 63 random bits each, for sorting into a random order."""
        words = self.integers(2 * n, offset=2 * offset, device=device).reshape(n, 2)
        return ((words[:, 0] >> 1) << 32) | words[:, 1]

    def permutation(self, n: int, *, device: str | torch.device = "cpu") -> Tensor:
        """A random order of 0 to n - 1, ``(n,)`` int64."""
        return torch.sort(self.keys(n, device=device), stable=True).indices

    def distinct(self, k: int, p: int, *, device: str | torch.device = "cpu") -> Tensor:
        """Draws k distinct numbers below p, every subset equally likely (up to p / 2^64), in ascending order.

        The first distinct numbers of a stream of draws are kept, so memory grows with k, not with p; where more than
        half are wanted, the others are drawn instead.

        Args:
            k: How many, at most p.
            p: Number of possible values.
            device: Where the result is made.

        Returns:
            ``(k,)`` int64.

        Raises:
            UsageError: If k is not between 0 and p.
        """
        if not 0 <= k <= p:
            raise UsageError(f"{k} distinct numbers below {p} were asked for; expected at most {p}.")
        if 2 * k > p:
            kept = torch.ones(p, dtype=torch.bool, device=device)
            kept[self._first_distinct(p - k, p, device)] = False
            return kept.nonzero().squeeze(1)
        return torch.sort(self._first_distinct(k, p, device)).values

    def _first_distinct(self, k: int, p: int, device: str | torch.device) -> Tensor:
        """The first k distinct values of the sequence of draws, in no particular order; expects 2 k <= p or so."""
        if k == 0:
            return torch.empty(0, dtype=torch.int64, device=device)
        # Drawing n leaves p (1 - exp(-n / p)) distinct ones on average; start a little above what that asks for.
        count = int(-p * math.log1p(-k / (p + 1)) + 4.0 * math.sqrt(k) + 16)
        while True:
            drawn = self._below(p, count, device)
            ordered, positions = torch.sort(drawn, stable=True)
            new = torch.ones_like(ordered, dtype=torch.bool)
            new[1:] = ordered[1:] != ordered[:-1]
            # A stable sort keeps equal values in the order of drawing, so the first of each run was drawn first.
            values, when = ordered[new], positions[new]
            if len(values) >= k:
                return values[torch.sort(when).indices[:k]]
            count += count // 2

    def _below(self, p: int, count: int, device: str | torch.device) -> Tensor:
        """``(count,)`` int64 uniform below p: the high word of a 64-bit draw times p."""
        words = self.integers(2 * count, device=device).reshape(count, 2)
        if p >= 1 << 31:
            raise UsageError(f"{p} values are more than a stream indexes; expected fewer than {1 << 31}.")
        return (words[:, 0] * p + ((words[:, 1] * p) >> 32)) >> 32

    def normal_rows(self, rows: Tensor, n_columns: int) -> Tensor:
        """Rows of a matrix of standard normal numbers.

        Args:
            rows: Row numbers ``(r,)``, int64.
            n_columns: Columns 0 to ``n_columns - 1`` are made.

        Returns:
            ``(r, n_columns)`` float32, by Box-Muller.
        """
        groups = torch.arange(-(-n_columns // 4), device=rows.device)
        return box_muller(self.words(rows[:, None], groups)).reshape(len(rows), -1)[:, :n_columns]

    def sign_rows(self, rows: Tensor, n_columns: int) -> Tensor:
        """Rows of a matrix of random signs, 128 of them per counter.

        Args:
            rows: Row numbers ``(r,)``, int64.
            n_columns: Columns 0 to ``n_columns - 1`` are made.

        Returns:
            ``(r, n_columns)`` float32 of -1 and 1.
        """
        groups = torch.arange(-(-n_columns // 128), device=rows.device)
        words = self.words(rows[:, None], groups).to(torch.int32)
        bits = torch.arange(32, device=rows.device, dtype=torch.int32)
        signs = ((words[..., None] >> bits) & 1).to(torch.float32)
        return signs.mul_(2.0).sub_(1.0).reshape(len(rows), -1)[:, :n_columns]

    def sparse_columns(self, columns: Tensor, n_rows: int, nonzeros: int) -> tuple[Tensor, Tensor]:
        """Columns of a sparse sign matrix: where each nonzero is, and its sign.

        Args:
            columns: Column numbers ``(n,)``, int64.
            n_rows: Number of rows.
            nonzeros: Per column, drawn with replacement.

        Returns:
            Row numbers ``(n, nonzeros)`` int64 below ``n_rows``, and signs ``(n, nonzeros)`` int64 of -1 and 1.
        """
        words = self.words(columns[:, None], torch.arange(nonzeros, device=columns.device))
        return (words[..., 0] * n_rows) >> 32, ((words[..., 1] & 1) << 1) - 1


def box_muller(words: Tensor) -> Tensor:
    """Standard normal numbers from words ``(..., 4)``: words 0 and 1 give numbers 0 and 1, words 2 and 3 the others.

    The radius comes from ``(word + 1/2) / 2^32``, which is never 0, so that the logarithm is finite.
    """
    radius = words[..., 0::2].to(torch.float32).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).clamp_(min=0.0).sqrt_()
    angle = words[..., 1::2].to(torch.float32).mul_(2.0 * math.pi * 2.0**-32)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(-2)

"""Counter-based random streams: the same integers on every device, in any order and any slice.

A stream is named by ``(seed, name, stage, checkpoint)``; the name is hashed into the 64-bit key of Philox-4x32-10
(Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and what a number is for
becomes its 128-bit counter. Nothing is drawn "next": every number can be computed alone, so that results do not depend
on batch size, chunking, device or the order of layers.

Counter layouts, as ``(c0, c1, c2, c3)``; ``c3`` keeps the helpers of one stream apart:

==================  ==============================================  ================================================
drawn by            counter                                         the call's four words give
==================  ==============================================  ================================================
`Stream.words`      as the caller says, usually c2 = c3 = 0         four u32; dense, sjlt and fjlt build on it
`Stream.uniform`    (e // 4 low, 0, e // 4 high, 1)                 elements e = 4q .. 4q + 3
`Stream.normal`     (e // 4 low, 0, e // 4 high, 2)                 4q, 4q + 1 from words 0, 1; 4q + 2, 4q + 3 from 2, 3
`Stream.integers`   (e // 4 low, 0, e // 4 high, 3)                 elements e = 4q .. 4q + 3
`Stream.distinct`   (e // 2 low, 0, e // 2 high, 4)                 candidates 2q, 2q + 1, 64 bits each
permutation         (e // 2 low, index, e // 2 high, 5)             sort keys 2q, 2q + 1, 64 bits each
`Stream.keep_mask`  (e // 8 low, 0, e // 8 high, 6)                 8 draws of 16 bits: low, high half of word 0, ...
==================  ==============================================  ================================================

Unsigned 32-bit words are held in int64 tensors: PyTorch's unsigned types lack most operations, and the wrapped int64
product of two words still has the exact 64 bits of the full product.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from grass_lib.errors import UsageError

STREAM_VERSION = 1
"""Part of every key: a change of any layout raises it, and stores written before are then refused by fingerprint."""

_LOW = 0xFFFFFFFF
_MULTIPLIER0, _MULTIPLIER1 = 0xD2511F53, 0xCD9E8D57
_WEYL0, _WEYL1 = 0x9E3779B9, 0xBB67AE85
_UNIFORM, _NORMAL, _INTEGERS, _DISTINCT, _PERMUTATION, _KEEP = range(1, 7)
# On a CPU not above the size from which torch splits an operation over threads: a chunk's 130 short operations gain
# little from a second thread, and lose a factor of ten when another process wants that core. On a GPU, few launches.
_CPU_CHUNK, _CUDA_CHUNK = 1 << 15, 1 << 22


def philox_(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> None:
    """Replaces four counter words by the four output words of Philox-4x32-10, in place.

    Args:
        counter: Four distinct int64 tensors of one shape, values in [0, 2**32).
        key: The two key words, each in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    product0, product1 = torch.empty_like(c0), torch.empty_like(c2)
    k0, k1 = key
    for _ in range(10):
        torch.mul(c0, _MULTIPLIER0, out=product0)
        torch.mul(c2, _MULTIPLIER1, out=product1)
        torch.bitwise_right_shift(product1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        torch.bitwise_right_shift(product0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        # Words 1 and 3 are the products' low halves. Their high halves may stay: the mask above drops them after the
        # xor. The even number of swaps leaves the results in the caller's tensors.
        c1, product1 = product1, c1
        c3, product0 = product0, c3
        k0, k1 = (k0 + _WEYL0) & _LOW, (k1 + _WEYL1) & _LOW
    c1.bitwise_and_(_LOW)
    c3.bitwise_and_(_LOW)


def box_muller(radius: Tensor, angle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two u32 words each.

    Args:
        radius: int64 words in [0, 2**32), any shape; word w gives the uniform (w + 1/2) / 2**32, exact in the tail.
        angle: int64 words of the same shape.
        dtype: float32 or float64: the type to compute in.

    Returns:
        ``(cosine branch, sine branch)`` of that shape and dtype.
    """
    length = radius.to(dtype).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    turn = (angle - 2**31).to(dtype).add_(0.5).mul_(math.pi * 2.0**-31)
    sine = turn.sin()
    return turn.cos_().mul_(length), sine.mul_(length)


@dataclass(frozen=True)
class Stream:
    """A named random stream; equal names give equal numbers everywhere.

    Attributes:
        seed: The run's seed.
        name: What the numbers belong to: a layer's name, a model's role and index.
        stage: What they are for: "sparsification", "projection", "init", ...
        checkpoint: Index of the checkpoint, so that the members of an ensemble are independent.

    Raises:
        UsageError: A field has the wrong type, or ``checkpoint`` is negative.
    """

    seed: int
    name: str = ""
    stage: str = ""
    checkpoint: int = 0

    def __post_init__(self) -> None:
        for field in ("seed", "checkpoint"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool):
                raise UsageError(f"stream {field} is {value!r}; expected an int")
        for field in ("name", "stage"):
            value = getattr(self, field)
            if not isinstance(value, str):
                raise UsageError(f"stream {field} is {value!r}; expected a str")
        if self.checkpoint < 0:
            raise UsageError(f"stream checkpoint is {self.checkpoint}; expected 0 or more")

    @cached_property
    def key(self) -> tuple[int, int]:
        """The two 32-bit key words: the first 64 bits of BLAKE2b over version, seed, name, stage and checkpoint."""
        # JSON quotes the strings, so that no two different names have one encoding.
        text = json.dumps([STREAM_VERSION, self.seed, self.name, self.stage, self.checkpoint], separators=(",", ":"))
        digest = hashlib.blake2b(text.encode("ascii")).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")

    def words(
        self,
        c0: Tensor | int,
        c1: Tensor | int = 0,
        c2: Tensor | int = 0,
        c3: Tensor | int = 0,
        *,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Four random words for each counter.

        Args:
            c0: First counter word: an int or an int64 tensor, values in [0, 2**32). The four broadcast together.
            c1: Second counter word.
            c2: Third counter word.
            c3: Fourth counter word; the helpers of this class use 1 to 6.
            device: Where to compute; None takes the first tensor's device, else the CPU.

        Returns:
            int64 ``(..., 4)``, values in [0, 2**32). A view of memory laid out as ``(4, ...)``.
        """
        parts = (c0, c1, c2, c3)
        if device is None:
            device = next((part.device for part in parts if isinstance(part, Tensor)), torch.device("cpu"))
        tensors = [torch.as_tensor(part, dtype=torch.int64, device=device) for part in parts]
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
        flat = [t if t.dim() == 0 else t.expand(shape).reshape(-1) for t in tensors]
        size = math.prod(shape)
        out = torch.empty((4, size), dtype=torch.int64, device=device)
        chunk = _CUDA_CHUNK if out.device.type == "cuda" else _CPU_CHUNK
        for start in range(0, size, chunk):
            rows = out[:, start : start + chunk]
            for row, part in zip(rows, flat, strict=True):
                row.copy_(part if part.dim() == 0 else part[start : start + chunk])
            philox_((rows[0], rows[1], rows[2], rows[3]), self.key)
        return out.view(4, *shape).movedim(0, -1)

    def uniform(
        self,
        shape: int | Sequence[int],
        *,
        offset: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Uniform numbers in [0, 1): elements ``offset`` to ``offset + size`` of the stream's uniform sequence.

        Args:
            shape: Shape of the result.
            offset: Index of the first element, so that any slice can be computed alone.
            device: Where to compute; None is the CPU.
            dtype: float32 (24 random bits) or float64 (32 bits).

        Returns:
            A tensor of ``shape``, filled in row-major order.
        """
        words = self._sequence(_shape(shape), offset, 4, _UNIFORM, device)
        if dtype == torch.float64:
            return words.to(dtype).mul_(2.0**-32)
        return (words >> 8).to(torch.float32).mul_(2.0**-24).to(dtype)

    def normal(
        self,
        shape: int | Sequence[int],
        *,
        offset: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Standard normal numbers by Box-Muller; arguments and result as in `uniform`.

        The integers behind them are identical on every device; the normals agree to rounding.
        """
        size = math.prod(_shape(shape))
        words = self._calls(offset, size, 4, _NORMAL, device)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        pairs = [box_muller(words[:, 0], words[:, 1], compute), box_muller(words[:, 2], words[:, 3], compute)]
        values = torch.stack([*pairs[0], *pairs[1]], dim=-1).reshape(-1)
        return values[offset % 4 : offset % 4 + size].reshape(_shape(shape)).to(dtype)

    def integers(
        self,
        high: int,
        shape: int | Sequence[int],
        *,
        offset: int = 0,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Integers in [0, high): the high word of u32 times ``high``; int64, arguments otherwise as in `uniform`.

        Raises:
            UsageError: ``high`` is not in [1, 2**32].
        """
        if not 1 <= high <= 2**32:
            raise UsageError(f"high is {high}; expected 1 to 2**32")
        words = self._sequence(_shape(shape), offset, 4, _INTEGERS, device)
        return scale_words(words, high)

    def distinct(self, k: int, p: int, *, device: torch.device | str | None = None) -> Tensor:
        """A uniformly random set of ``k`` distinct indices out of ``p``.

        The first min(k, p - k) distinct values of a sequence of uniform 64-bit indices are taken, in order of
        appearance, and the complement where k > p / 2. So no table of size p is made unless k is of that size, and the
        result does not depend on how much of the sequence was drawn at once.

        Args:
            k: Number of indices, 0 <= k <= p.
            p: Size of the range, at most 2**32.
            device: Where to compute; None is the CPU.

        Returns:
            int64 ``(k,)``, ascending.

        Raises:
            UsageError: ``k`` or ``p`` is out of range.
        """
        if not 0 <= k <= p or p > 2**32:
            raise UsageError(f"cannot choose k={k} of p={p} indices; expected 0 <= k <= p <= 2**32")
        wanted = min(k, p - k)
        # Expected number of draws for `wanted` distinct values, with some room; too few only costs another round.
        draws = 64 + int(-p * math.log1p(-wanted / p) * 1.02) if p else 0
        chosen = torch.empty(0, dtype=torch.int64, device=device)
        while chosen.numel() < wanted:
            words = self._calls(0, draws, 2, _DISTINCT, device)
            high, low = words[:, 0::2].reshape(-1), words[:, 1::2].reshape(-1)
            # High word of the 96-bit product (high, low) * p, from two 64-bit products.
            values = ((high * p + ((low * p >> 32) & _LOW)) >> 32) & _LOW
            values, order = torch.sort(values, stable=True)
            first = torch.ones_like(values, dtype=torch.bool)
            first[1:] = values[1:] != values[:-1]
            chosen = values[first][torch.argsort(order[first])][:wanted]
            draws *= 2
        if wanted == k:
            return torch.sort(chosen).values
        kept = torch.ones(p, dtype=torch.bool, device=chosen.device)
        kept[chosen] = False
        return kept.nonzero().squeeze(1)

    def permutation(self, n: int, *, index: int = 0, device: torch.device | str | None = None) -> Tensor:
        """A random order of ``n`` items: the order of their 64-bit keys.

        Args:
            n: Number of items.
            index: Which of the stream's permutations, for example the epoch; 0 <= index < 2**32.
            device: Where to compute; None is the CPU.

        Returns:
            int64 ``(n,)``, a permutation of 0 .. n - 1.
        """
        if n < 0 or not 0 <= index < 2**32:
            raise UsageError(f"permutation of n={n} with index={index}; expected n >= 0 and 0 <= index < 2**32")
        words = self._calls(0, n, 2, _PERMUTATION, device, c1=index)
        keys = (words[:, 0::2] << 32 | words[:, 1::2]).reshape(-1)[:n]
        return torch.argsort(keys, stable=True)

    def keep_mask(
        self,
        shape: int | Sequence[int],
        drop_probability: float,
        *,
        offset: int = 0,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A dropout mask: True with probability 1 - drop_probability, rounded to a multiple of 2**-16.

        Eight elements cost one Philox call.

        Args:
            shape: Shape of the mask.
            drop_probability: In [0, 1].
            offset: Index of the first element, so that any slice can be computed alone.
            device: Where to compute; None is the CPU.

        Returns:
            bool tensor of ``shape``.

        Raises:
            UsageError: The probability is not in [0, 1].
        """
        if not 0.0 <= drop_probability <= 1.0:
            raise UsageError(f"drop_probability is {drop_probability}; expected 0 to 1")
        threshold = round(drop_probability * 2**16)
        size = math.prod(_shape(shape))
        words = self._calls(offset, size, 8, _KEEP, device)
        keep = torch.empty((words.shape[0], 4, 2), dtype=torch.bool, device=words.device)
        torch.ge(words & 0xFFFF, threshold, out=keep[:, :, 0])
        torch.ge(words, threshold << 16, out=keep[:, :, 1])
        return keep.reshape(-1)[offset % 8 : offset % 8 + size].reshape(_shape(shape))

    def _calls(
        self, offset: int, size: int, per_call: int, tag: int, device: torch.device | str | None, c1: int = 0
    ) -> Tensor:
        """Words ``(calls, 4)`` of the calls that cover elements offset .. offset + size."""
        if offset < 0:
            raise UsageError(f"offset is {offset}; expected 0 or more")
        end = -(-(offset + size) // per_call) if size else offset // per_call
        calls = torch.arange(offset // per_call, end, device=device)
        return self.words(calls & _LOW, c1, calls >> 32, tag, device=device)

    def _sequence(
        self, shape: tuple[int, ...], offset: int, per_call: int, tag: int, device: torch.device | str | None
    ) -> Tensor:
        size = math.prod(shape)
        words = self._calls(offset, size, per_call, tag, device).reshape(-1)
        return words[offset % per_call : offset % per_call + size].reshape(shape)


def scale_words(words: Tensor, high: int) -> Tensor:
    """Maps u32 words to integers in [0, high), high <= 2**32: the high word of the product; int64, same shape."""
    return (words * high >> 32) & _LOW


def _shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)

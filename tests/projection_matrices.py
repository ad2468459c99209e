"""Projection matrices built entry by entry in Python, in float64: what projectors are compared with."""

from __future__ import annotations

import math

import numpy as np
import torch
from philox_reference import normal_pair, philox, stream_key
from torch import Tensor


def _words(counter: tuple[int, ...], seed: int, name: str, stage: str, checkpoint: int) -> tuple[int, int, int, int]:
    c0, c1 = counter
    return philox((c0, c1, 0, 0), stream_key(seed, name, stage, checkpoint))


def normal(p: int, k: int, *stream) -> Tensor:
    matrix = np.zeros((p, k))
    for j in range(p):
        for t in range(k):
            a, b, c, d = _words((j, t // 4), *stream)
            matrix[j, t] = (*normal_pair(a, b), *normal_pair(c, d))[t % 4]
    return torch.from_numpy(matrix / math.sqrt(k))


def rademacher(p: int, k: int, *stream) -> Tensor:
    matrix = np.zeros((p, k))
    for j in range(p):
        for t in range(k):
            word = _words((j, t // 128), *stream)[t % 128 // 32]
            matrix[j, t] = 1 if word >> (t % 32) & 1 else -1
    return torch.from_numpy(matrix / math.sqrt(k))


def sjlt(p: int, k: int, c: int, *stream) -> Tensor:
    matrix = np.zeros((p, k))
    for j in range(p):
        for nonzero in range(c):
            words = _words((j, nonzero), *stream)
            matrix[j, words[0] * k >> 32] += (1 if words[1] & 1 else -1) / math.sqrt(c)
    return torch.from_numpy(matrix)


def fjlt(p: int, k: int, *stream) -> Tensor:
    n = 1
    while n < k:
        n *= 2
    matrix = np.zeros((p, k))
    for block in range(math.ceil(p / n)):
        keys = []
        for t in range(n):
            words = _words((block, 1 + t // 2), *stream)
            key = words[t % 2 * 2] * 2**32 + words[t % 2 * 2 + 1]
            keys.append(key - 2**64 if key >= 2**63 else key)
        rows = sorted(range(n), key=keys.__getitem__)[:k]
        for t, row in enumerate(rows):
            for column in range(min(n, p - block * n)):
                j = block * n + column
                word = _words((j // 128, 0), *stream)[j % 128 // 32]
                sign = (1 if word >> (j % 32) & 1 else -1) * (1 if keys[row] % 2 else -1)
                hadamard = (-1) ** (row & column).bit_count() / math.sqrt(n)
                matrix[j, t] = math.sqrt(n / k) * sign * hadamard
    return torch.from_numpy(matrix)


def mask(p: int, kept: list[int], scale: float) -> Tensor:
    matrix = torch.zeros(p, len(kept), dtype=torch.float64)
    for t, j in enumerate(kept):
        matrix[j, t] = scale
    return matrix

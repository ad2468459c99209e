"""Philox-4x32-10 and the stream's key in plain Python integers: what the library's tensors are compared with."""

from __future__ import annotations

import hashlib
import math


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ k, right % 2**32, (left >> 32) ^ d ^ m, left % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return a, b, c, d


def stream_key(seed: int, name: str, stage: str, checkpoint: int) -> tuple[int, int]:
    text = f'[1,{seed},"{name}","{stage}",{checkpoint}]'
    digest = hashlib.blake2b(text.encode()).digest()
    return int.from_bytes(digest[0:4], "little"), int.from_bytes(digest[4:8], "little")


def normal_pair(radius: int, angle: int) -> tuple[float, float]:
    length = math.sqrt(-2 * math.log((radius + 0.5) / 2**32))
    # The angle starts at -pi.
    turn = 2 * math.pi * (angle + 0.5) / 2**32 - math.pi
    return length * math.cos(turn), length * math.sin(turn)

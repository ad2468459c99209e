"""Contraction over tokens and stage 2 of many layers by one launch, without writing the contraction down."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.kernels import nvrtc

_LAYERS = 64  # of one launch: their addresses are its arguments, of which there are at most 4 KiB
_LAYER_BYTES = 56
_TOKENS, _STAGES, _THREADS = 32, 3, 256
_NEAR_BYTES = 115_000  # of shared memory: two thread blocks still fit beside each other where there are 228 KiB
_LARGEST = 1 << 14  # of k1 * k2: sums of a thread block stay in registers, places in 15 bits


@dataclass(frozen=True, eq=False)
class DestinationTable:
    """An SJLT sorted by destination: every output has its entries side by side, in ascending order of the columns.

    Attributes:
        entries: int16 ``(p * c,)``: sign in the highest bit, column below.
        offsets: int32 ``(k + 1,)``: the first entry of each destination.
        k: Number of destinations.
    """

    entries: Tensor
    offsets: Tensor
    k: int


def destination_table(destinations: Tensor, negative: Tensor, k: int) -> DestinationTable:
    """Sorts an SJLT; runs on the device of its arguments.

    Args:
        destinations: ``(p, c)`` integers in ``[0, k)``, p at most 32,768.
        negative: ``(p, c)`` bool, True where the nonzero is -1.
        k: Number of destinations.
    """
    flat, c = destinations.reshape(-1), destinations.shape[1]
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=k)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    words = order // c + (negative.reshape(-1)[order].to(torch.int64) << 15)
    entries = torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)
    return DestinationTable(entries, offsets, k)


def fits_contraction(left: Tensor, right: Tensor) -> bool:
    """Whether `contract` can take a layer's sides: bfloat16 on a GPU, sides multiples of 16, not too large together.

    Args:
        left: Output side ``(samples, tokens, k1)``.
        right: Input side ``(samples, tokens, k2)``.
    """
    k1, k2 = left.shape[-1], right.shape[-1]
    return (
        left.is_cuda
        and left.dtype == right.dtype == torch.bfloat16
        and left.dim() == right.dim() == 3
        and left.shape[:2] == right.shape[:2]
        and _even_rows(left)
        and _even_rows(right)
        and k1 % 16 == k2 % 16 == 0
        and 0 < k1 * k2 <= _LARGEST
        and min(left.shape) > 0
        and torch.cuda.get_device_capability(left.device) >= (8, 0)
        and nvrtc.missing_for_kernels() is None
        and _shared_bytes(k1, k2) <= nvrtc.shared_memory(left.device)
    )


def _shared_bytes(k1: int, k2: int) -> int:
    """Shared memory of a thread block: tiles of both sides on their way, or the whole product after them."""
    return max(_STAGES * _TOKENS * 2 * (k1 + k2 + 16), 4 * k1 * k2)


def _even_rows(side: Tensor) -> bool:
    """Whether all tokens of a batch lie one distance apart, each at a multiple of 16 bytes."""
    pitch = side.stride(1)
    return side.stride(2) == 1 and side.stride(0) == side.shape[1] * pitch and pitch % 8 == side.data_ptr() % 16 == 0


def contract(
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    tables: Sequence[DestinationTable] | None,
    scales: Sequence[float],
) -> Tensor:
    """``scale * SJLT(flatten(sum_t left_t^T right_t))`` of layers with equal shapes; see `fits_contraction`.

    Products of bfloat16 numbers are exact and are added in float32.

    Args:
        lefts: Output sides, each ``(samples, tokens, k1)``.
        rights: Input sides, each ``(samples, tokens, k2)``.
        tables: Stage 2 of each layer, all with one k; None for none.
        scales: Of each layer.

    Returns:
        float32 ``(layers, samples, k)``, or ``(layers, samples, k1 * k2)`` without a stage 2.
    """
    (samples, tokens, k1), k2 = lefts[0].shape, rights[0].shape[2]
    k = k1 * k2 if tables is None else tables[0].k
    out = torch.empty(len(lefts), samples, k, dtype=torch.float32, device=lefts[0].device)
    shared = _shared_bytes(k1, k2)
    entries = 0 if tables is None else len(tables[0].entries)
    table_bytes = 2 * entries + 4 * (k + 4)
    near = entries > 0 and all(len(table.entries) == entries for table in tables or ())
    near = near and shared + table_bytes <= _NEAR_BYTES and nvrtc.shared_memory(out.device) > 2 * _NEAR_BYTES
    constants = {
        "IN": 2,
        "OUT": 0,
        "K1": k1,
        "K2": k2,
        "SJLT": int(tables is not None),
        "NEAR": shared if near else 0,
        "ENTRIES": entries if near else 0,
        "LAYERS": _LAYERS,
    }
    shared += table_bytes if near else 0
    kernel = nvrtc.kernel("contract.cu", "contract", "Sii", constants, out.device)
    for start in range(0, len(lefts), _LAYERS):
        places = range(start, min(start + _LAYERS, len(lefts)))
        words = b"".join(
            struct.pack(
                "=5Qf2i4x",
                lefts[i].data_ptr(),
                rights[i].data_ptr(),
                0 if tables is None else tables[i].entries.data_ptr(),
                0 if tables is None else tables[i].offsets.data_ptr(),
                out[i].data_ptr(),
                scales[i],
                lefts[i].stride(1),
                rights[i].stride(1),
            )
            for i in places
        )
        words = words.ljust(_LAYER_BYTES * _LAYERS, b"\0")
        kernel.launch((samples, len(places)), _THREADS, shared, (words, tokens, k))
    return out

"""Chosen entries of a layer's weight gradients from its inputs and output gradients, by one launch a layer.

``out[s, i] = sum over t of left[s, row_i, t] * right[s, at_i, t]``, where ``left`` is the gradient of the outputs and
``right`` the input, seen from the entry's place in the kernel of a convolution. Both factors have their positions side
by side, so that the reads of neighbouring threads are neighbours too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.kernels import nvrtc

_THREADS, _ITEMS = 256, 4
_REFERENCE_ELEMENTS = 1 << 20
_LARGEST = 1 << 31


@dataclass(frozen=True, eq=False)
class SampledPlan:
    """The tables and the grid of a launch, for inputs of one shape.

    Attributes:
        entries: int32 ``(k, 2)``: where an entry's row of ``left`` begins, and where its first position lies in
            ``right``, both within a sample; -1 for a bias, whose right factor is 1.
        places: int32 ``(tokens,)``: where the positions lie in ``right`` behind the first one.
        group: Lanes that share an entry.
        blocks: Thread blocks along the entries.
    """

    entries: Tensor
    places: Tensor
    group: int
    blocks: int


class SampledTable:
    """The chosen entries of one layer.

    Attributes:
        size: Their number, biases included.
    """

    def __init__(self, rows: Tensor, places: Tensor, bias: Tensor, device: torch.device) -> None:
        """Takes the entries.

        Args:
            rows: int64 ``(m,)``: output feature or channel of each weight.
            places: int64 ``(m, 1 + d)``: input feature or channel of each weight and its place in the kernel of a
                convolution over d dimensions; d is 0 for a linear layer.
            bias: int64 ``(b,)``: output features whose bias follows the weights.
            device: Of the factors.
        """
        self.size = len(rows) + len(bias)
        self._rows = torch.cat([rows, bias]).to(device)
        self._places, self._bias = places.to(device), len(bias)
        self._plans: dict[tuple[tuple[int, ...], ...], SampledPlan] = {}

    def plan(
        self, shape: Sequence[int], positions: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
    ) -> SampledPlan:
        """The launch for inputs of a shape; made once.

        Args:
            shape: Of the input behind its channels, padding included; ``(tokens,)`` for a linear layer.
            positions: Of the output behind its channels.
            stride: Of the layer; 1 for a linear one.
            dilation: Of the layer; 1 for a linear one.
        """
        key = tuple(shape), tuple(positions), tuple(stride), tuple(dilation)
        if key not in self._plans:
            device, tokens = self._rows.device, math.prod(positions)
            steps = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
            bases = self._places[:, 0] * math.prod(shape)
            for dim in range(self._places.shape[1] - 1):
                bases = bases + self._places[:, 1 + dim] * (dilation[dim] * steps[dim])
            bases = torch.cat([bases, bases.new_full((self._bias,), -1)])
            places = torch.zeros(1, dtype=torch.int64, device=device)
            for dim, length in enumerate(positions):
                along = torch.arange(length, device=device) * (stride[dim] * steps[dim])
                places = (places[:, None] + along).flatten()
            entries = torch.stack([self._rows * tokens, bases], dim=1).to(torch.int32)
            group = min(32, 1 << max(0, tokens - 1).bit_length())
            blocks = -(-self.size // (_THREADS // group * _ITEMS))
            self._plans[key] = SampledPlan(entries.contiguous(), places.to(torch.int32), group, blocks)
        return self._plans[key]


def sampled_product(
    left: Tensor,
    right: Tensor,
    table: SampledTable,
    positions: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The chosen entries; on a CPU by `sampled_reference`.

    Args:
        left: ``(n, R, tokens)``, gradient of the outputs.
        right: ``(n, C, *shape)``, the padded input.
        table: The entries.
        positions: Shape of the output behind its channels.
        stride: Of the layer.
        dilation: Of the layer.

    Returns:
        ``(n, k)``, float32 (float64 on a CPU, where the factors are).

    Raises:
        UsageError: The factors are float64 on a GPU, or a sample has 2^31 elements or more.
    """
    plan = table.plan(right.shape[2:], positions, stride, dilation)
    if left.dtype != right.dtype:
        left, right = left.float(), right.float()
    left, right = left.contiguous().flatten(1), right.contiguous().flatten(1)
    if max(left.shape[1], right.shape[1]) >= _LARGEST:
        raise UsageError(
            f'backend="kernel" takes up to {_LARGEST - 1} elements a sample, and a layer has '
            f'{max(left.shape[1], right.shape[1])}; use backend="torch"'
        )
    if not left.is_cuda:
        return sampled_reference(left, right, plan)
    if left.dtype not in nvrtc.DTYPE_CODES:
        raise UsageError(
            f'backend="kernel" takes float32, float16 and bfloat16 activations, got {left.dtype}; use backend="torch"'
        )
    out = torch.empty(len(left), table.size, dtype=torch.float32, device=left.device)
    if out.numel() == 0:
        return out
    constants = {
        "IN": nvrtc.DTYPE_CODES[left.dtype],
        "OUT": 0,
        "THREADS": _THREADS,
        "GROUP": plan.group,
        "ITEMS": _ITEMS,
    }
    kernel = nvrtc.kernel("sampled.cu", "sampled", "PlPlPiPiiP", constants, left.device)
    kernel.launch(
        (plan.blocks, min(len(left), 65535)),
        _THREADS,
        0,
        (
            left.data_ptr(),
            left.stride(0),
            right.data_ptr(),
            right.stride(0),
            plan.entries.data_ptr(),
            table.size,
            plan.places.data_ptr(),
            len(plan.places),
            len(left),
            out.data_ptr(),
        ),
    )
    return out


def sampled_reference(left: Tensor, right: Tensor, plan: SampledPlan) -> Tensor:
    """What the kernel computes, by PyTorch and from the same tables.

    Args:
        left: ``(n, R * tokens)``.
        right: ``(n, elements)``.
        plan: Tables.

    Returns:
        ``(n, k)``, at least float32.
    """
    if left.dtype in (torch.float16, torch.bfloat16):
        left, right = left.float(), right.float()
    tokens = len(plan.places)
    along, places = torch.arange(tokens, device=left.device), plan.places.long()
    step = max(1, _REFERENCE_ELEMENTS // max(1, len(left) * tokens))
    found = []
    for entries in plan.entries.long().split(step):
        rows, bases = entries[:, :1], entries[:, 1:]
        factor = right[:, (bases.clamp(min=0) + places).flatten()].view(len(left), -1, tokens)
        factor = torch.where(bases < 0, torch.ones_like(factor), factor)
        found.append((left[:, (rows + along).flatten()].view_as(factor) * factor).sum(dim=2))
    return torch.cat(found, dim=1)

"""What the forward pass keeps of a layer's input: the compressed input side, never the input itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from grass_lib.gradients.layers import LayerShape
from grass_lib.gradients.sides import Side
from grass_lib.kernels.columns import kept_columns


class InputSide:
    """Compresses the input of a layer, module and tensor to ``(batch, ..., k2)``.

    Attributes:
        appends_bias: Whether the contraction adds the bias column, whose input is 1, at the end: where the whole input
            is kept, a column of ones beside it would be a copy.
        counts_tokens: Whether token numbers are kept as they are (an embedding with its whole vocabulary).
        padding: Token of an embedding that never gets a gradient.
    """

    def __init__(self, side: Side, shape: LayerShape, dtype: torch.dtype) -> None:
        """Lays out the tables.

        Args:
            side: Of the input.
            shape: Of the layer.
            dtype: Of the layer's weights.
        """
        self.counts_tokens = shape.kind == "embedding" and side.is_identity
        self.padding: int | None = None
        self._kind, self._k = shape.kind, side.k
        self._matrix = side.applied(dtype)
        self._bias, self._dtype = shape.bias, dtype
        self._columns = self._places = None
        self._ones = False
        if side.index is not None:
            self._ones = shape.bias and int(side.index[-1]) == side.d - 1
            self._columns = side.index[:-1] if self._ones else side.index
            if shape.kind == "embedding":
                self._places = torch.full((side.d,), -1, dtype=torch.int64, device=side.index.device)
                self._places[side.index] = torch.arange(side.k, device=side.index.device)
        self.appends_bias = shape.bias and side.is_identity and shape.kind not in ("layernorm", "rmsnorm")

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        """The compressed input.

        Args:
            module: The layer.
            x: Its input: ``(batch, ..., d_in)``, images ``(batch, channels, height, width)``, or token numbers.

        Returns:
            ``(batch, ..., k2)``; ``(batch, k2, positions)`` for a convolution; token numbers where `counts_tokens`.
        """
        if self._kind == "embedding":
            return self._tokens(module, x)
        if self._kind == "conv2d":
            return self._patches(module, x)
        if self._columns is not None:
            return kept_columns(x, self._columns, self._ones)
        if self._matrix is None:
            return x.detach()
        matrix = self._matrix.to(x.dtype)
        if not self._bias:
            return x @ matrix
        return torch.addmm(matrix[-1], x.flatten(0, -2), matrix[:-1]).unflatten(0, x.shape[:-1])

    @property
    def kept(self) -> tuple[Tensor | None, bool]:
        """Kept columns, int64 ``(k,)`` ascending (None without a mask), and whether a column of ones follows them."""
        return self._columns, self._ones

    def _tokens(self, module: nn.Module, ids: Tensor) -> Tensor:
        padding = getattr(module, "padding_idx", None)
        if self.counts_tokens:
            self.padding = padding
            return ids
        if self._places is not None:
            place = self._places[ids]
            kept = (place.unsqueeze(-1) == torch.arange(self._k, device=ids.device)).to(self._dtype)
        elif self._matrix is not None:
            kept = functional.embedding(ids, self._matrix)
        else:
            kept = ids
        return kept if padding is None else kept * (ids != padding).unsqueeze(-1)

    def _patches(self, module: Any, x: Tensor) -> Tensor:
        height, width = module.kernel_size
        geometry = {"stride": module.stride, "dilation": module.dilation}
        pads = list(module._reversed_padding_repeated_twice)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        if self._matrix is not None:
            # Compressing every patch is a convolution with the map's columns as kernels: no patch is written out.
            matrix = self._matrix.to(x.dtype)
            weights = matrix[: x.shape[1] * height * width].mT.reshape(self._k, x.shape[1], height, width)
            bias = matrix[-1] if self._bias else None
            return functional.conv2d(functional.pad(x, pads, mode=mode), weights, bias, **geometry).flatten(2)
        if self._columns is None:
            return functional.unfold(functional.pad(x, pads, mode=mode), (height, width), **geometry)
        columns, (step_down, step_along), (gap_down, gap_along) = self._columns, module.stride, module.dilation
        padded = functional.pad(x.index_select(1, columns // (height * width)), pads, mode=mode)
        high = (padded.shape[2] - gap_down * (height - 1) - 1) // step_down + 1
        wide = (padded.shape[3] - gap_along * (width - 1) - 1) // step_along + 1
        down = torch.arange(high, device=x.device) * step_down
        along = torch.arange(wide, device=x.device) * step_along
        start = columns % (height * width) // width * gap_down * padded.shape[3] + columns % width * gap_along
        place = start[:, None] + (down[:, None] * padded.shape[3] + along).flatten()
        kept = padded.flatten(2).gather(2, place.expand(len(x), -1, -1))
        return torch.cat([kept, kept.new_ones(len(kept), 1, kept.shape[2])], dim=1) if self._ones else kept


def moments(module: nn.Module, x: Tensor, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation that a norm divides by: two of ``(batch, ..., 1)``, at least float32.

    Args:
        module: A LayerNorm or an RMSNorm.
        x: Its input.
        centred: Whether the mean is taken out, as a LayerNorm does.
    """
    wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
    eps = next(
        (value for name in ("eps", "variance_epsilon") if (value := getattr(module, name, None)) is not None), None
    )
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if centred:
        variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
    else:
        variance, mean = wide.square().mean(dim=-1, keepdim=True), torch.zeros_like(wide[..., :1])
    return mean, torch.rsqrt(variance + eps)

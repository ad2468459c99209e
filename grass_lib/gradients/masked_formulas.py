"""Kept coordinates of embeddings and norms by their formulas, and the class for every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from grass_lib.gradients.capture import as_tokens
from grass_lib.gradients.coordinates import KeptPart
from grass_lib.gradients.masked_layers import MaskedConvolution, MaskedLayer, MaskedLinear
from grass_lib.gradients.pairs import scratch_elements, wide


class MaskedEmbedding(MaskedLayer):
    """A lookup table; inputs are token numbers ``(n, ...)``, or one row of positions for all samples."""

    def _prepare(self, module: Any) -> None:
        self._vocabulary, width = module.weight.shape
        tokens = self._weight // width
        counts = torch.bincount(tokens, minlength=self._vocabulary)
        if module.padding_idx is not None:
            counts[module.padding_idx] = 0
        # Where the coordinates of a token begin (those of padding are there and never reached), and how many it has.
        self._starts = torch.searchsorted(tokens, torch.arange(self._vocabulary)).to(self.device)
        self._counts, self._most = counts.to(self.device), int(counts.max())
        self._along = torch.arange(self._most, device=self.device)
        self._features = (self._weight % width).to(self.device)

    def fits(self, x: Tensor, y: Tensor, n: int) -> bool:
        """Whether input and output have samples on dimension 0."""
        return x.dim() > 1 and len(x) == len(y) and len(x) in (1, n)

    def rows(self, delta: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """The kept coordinates, see `MaskedLayer.rows`."""
        delta = as_tokens(delta)
        ids = kept[0].expand(len(delta), *kept[0].shape[1:]).flatten(1)
        step = max(1, scratch_elements(delta.device) // max(1, ids.shape[1] * self._most))
        found = [self._some(delta[lo : lo + step], ids[lo : lo + step]) for lo in range(0, len(ids), step)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _some(self, delta: Tensor, ids: Tensor) -> Tensor:
        # As many entries for every token as the token with most kept coordinates has: how many there really are, the
        # host could only learn by waiting for the device. Those too many add zeros to what follows.
        columns = (self._starts[ids][..., None] + self._along).clamp(max=len(self._features) - 1)
        there = self._along < self._counts[ids][..., None]
        values = wide(delta.gather(2, self._features[columns])).masked_fill(~there, 0)
        rows = torch.arange(len(ids), device=ids.device)[:, None, None] * self.size
        values, place = values.flatten(), (columns + rows).flatten()
        out = torch.zeros(len(ids) * self.size, device=delta.device, dtype=values.dtype)
        if out.is_cuda:
            # Sorts before it adds: no float atomics, unlike index_add_.
            out.index_put_((place,), values, accumulate=True)
        else:
            out.index_add_(0, place, values)
        return out.view(len(ids), self.size)


class MaskedBatchNorm(MaskedLayer):
    """Batch normalisation in evaluation mode, by running moments; inputs ``(n, channels, ...)``."""

    def _prepare(self, module: Any) -> None:
        self._eps, self._weight_rows = module.eps, self._weight.to(self.device)

    def keep(self, module: Any, x: Tensor) -> tuple[Tensor, ...]:
        """The input and the running moments of the weights in use."""
        return x.detach(), module.running_mean.detach(), module.running_var.detach()

    def rows(self, delta: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """The kept coordinates, see `MaskedLayer.rows`."""
        x, mean, variance = kept
        parts = []
        if len(self._weight):
            centre, spread = mean[self._weight_rows], variance[self._weight_rows]
            normal = wide(_channels(x, self._weight_rows)) - wide(centre)[:, None]
            weight = _channels(delta, self._weight_rows) * normal * torch.rsqrt(wide(spread) + self._eps)[:, None]
            parts.append(weight.sum(dim=2))
        if len(self._bias):
            parts.append(wide(_channels(delta, self._bias_rows)).sum(dim=2))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class MaskedGroupNorm(MaskedLayer):
    """Normalisation of groups of channels; inputs ``(n, channels, ...)``."""

    def _prepare(self, module: Any) -> None:
        self._groups, self._eps, self._weight_rows = module.num_groups, module.eps, self._weight.to(self.device)

    def rows(self, delta: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """The kept coordinates, see `MaskedLayer.rows`."""
        normal = functional.group_norm(wide(kept[0]), self._groups, eps=self._eps)
        weight = _channels(delta, self._weight_rows) * _channels(normal, self._weight_rows)
        return torch.cat([weight.sum(dim=2), wide(_channels(delta, self._bias_rows)).sum(dim=2)], dim=1)


class MaskedLayerNorm(MaskedLayer):
    """Normalisation over the last dimensions, with or without centring; inputs ``(n, ..., *shape)``."""

    def _prepare(self, module: Any) -> None:
        self._dims, self._weight_rows = module.weight.dim(), self._weight.to(self.device)
        self._centred = isinstance(module, nn.LayerNorm)
        names = ("eps", "variance_epsilon")
        self._eps: Any = next((value for name in names if (value := getattr(module, name, None)) is not None), None)

    def fits(self, x: Tensor, y: Tensor, n: int) -> bool:
        """Whether input and output have samples on dimension 0."""
        return x.dim() > self._dims and super().fits(x, y, n)

    def rows(self, delta: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """The kept coordinates, see `MaskedLayer.rows`."""
        x, shape = wide(kept[0]), kept[0].shape[-self._dims :]
        if self._centred:
            x = functional.layer_norm(x, shape, eps=self._eps)
        else:
            x = functional.rms_norm(x, shape, eps=torch.finfo(kept[0].dtype).eps if self._eps is None else self._eps)
        delta = as_tokens(delta.flatten(-self._dims))
        weight = delta.index_select(2, self._weight_rows) * as_tokens(x.flatten(-self._dims))[..., self._weight_rows]
        return torch.cat([weight.sum(dim=1), wide(delta.index_select(2, self._bias_rows)).sum(dim=1)], dim=1)


def _channels(x: Tensor, rows: Tensor) -> Tensor:
    """Chosen channels with all positions as one dimension, ``(n, m, positions)``."""
    return x.index_select(1, rows).reshape(len(x), len(rows), -1) if len(rows) else x.new_empty(len(x), 0, 1)


def masked_layer(
    name: str, module: nn.Module, parts: Mapping[str, KeptPart], device: torch.device, *, kernel: bool
) -> MaskedLayer | None:
    """The class for a layer, or None where its gradient has to be formed whole.

    A class that computes something of its own in ``forward`` is not taken for the one that it derives from.

    Args:
        name: Module name.
        module: The layer.
        parts: Kept coordinates of its weight and bias.
        device: Of the computation.
        kernel: Uses the GPU kernel for linear layers and convolutions.
    """
    if not set(parts) <= {"weight", "bias"}:
        return None
    forward = type(module).forward
    dims = {nn.Conv1d.forward: nn.Conv1d, nn.Conv2d.forward: nn.Conv2d, nn.Conv3d.forward: nn.Conv3d}
    # Classes of transformers are known by name, so that the package is not needed here.
    theirs = type(module).__name__ if type(module).__module__.startswith("transformers.") else ""
    if forward is nn.Linear.forward or theirs == "Conv1D":
        return MaskedLinear(name, module, parts, device, kernel=kernel)
    if forward in dims and type(module)._conv_forward is dims[forward]._conv_forward:  # pyright: ignore[reportAttributeAccessIssue]
        return MaskedConvolution(name, module, parts, device, kernel=kernel)
    if forward is nn.Embedding.forward and not (module.max_norm or module.scale_grad_by_freq):
        return MaskedEmbedding(name, module, parts, device)
    if forward is nn.BatchNorm2d.forward and isinstance(module.running_mean, Tensor):
        return MaskedBatchNorm(name, module, parts, device)
    if forward is nn.GroupNorm.forward:
        return MaskedGroupNorm(name, module, parts, device)
    if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward) or (theirs.endswith("RMSNorm") and "bias" not in parts):
        return MaskedLayerNorm(name, module, parts, device)
    return None

"""EK-FAC from its definition, in float64, to check other systems' against; for small models."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from grass_lib.baselines.models import sequence_losses


def ekfac_scores(
    model: nn.Module,
    layers: Sequence[str],
    train_ids: Tensor,
    query_ids: Tensor,
    *,
    matrices: Mapping[str, Tensor] | None = None,
    damping: float = 0.1,
) -> Tensor:
    """Scores ``g^T (Q_A x Q_S) (L + damping * mean(L) I)^-1 (Q_A x Q_S)^T h`` summed over layers.

    ``Q_A`` and ``Q_S`` are the eigenvectors of the second moments of a layer's inputs (with a 1 for the bias) and of
    the gradients at its outputs over all tokens; ``L`` are the second moments of a sample's gradient in that basis
    (George et al. 2018). Labels are those of the data.

    Args:
        model: Linear layers of ``torch.nn.Linear``; a float64 copy is made.
        layers: Their names.
        train_ids: ``(n_train, length)``.
        query_ids: ``(n_query, length)``.
        matrices: ``{"layer/output": (d_out, k1), "layer/input": (d_in, k2)}``, which shorten both sides first.
        damping: Times the mean eigenvalue of each layer.

    Returns:
        float64 ``(n_train, n_query)``.
    """
    train, query = (_sides(model, layers, ids) for ids in (train_ids, query_ids))
    total = torch.zeros(len(train_ids), len(query_ids), dtype=torch.float64)
    for name in layers:
        pairs = [_shortened(name, part[name], matrices) for part in (train, query)]
        delta, x = pairs[0]
        left = torch.linalg.eigh(torch.einsum("nti,ntj->ij", delta, delta))[1]
        right = torch.linalg.eigh(torch.einsum("nti,ntj->ij", x, x))[1]
        rows, queries = (torch.einsum("nti,ntj->nij", d @ left, a @ right) for d, a in pairs)
        values = rows.square().mean(dim=0)
        inverse = 1.0 / (values + damping * values.mean())
        total += rows.flatten(1) @ (queries * inverse).flatten(1).mT
    return total


def _shortened(name: str, sides: tuple[Tensor, Tensor], matrices: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor]:
    if matrices is None:
        return sides
    return sides[0] @ matrices[f"{name}/output"].double(), sides[1] @ matrices[f"{name}/input"].double()


def _sides(model: nn.Module, layers: Sequence[str], ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer, gradients at its output ``(n, T, d_out)`` and its inputs ``(n, T, d_in + bias)``."""
    exact = copy.deepcopy(model).double().cpu()
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            x = args[0].detach()
            ones = x.new_ones(*x.shape[:-1], 1)
            inputs[name] = torch.cat([x, ones], dim=-1) if module.bias is not None else x
            y.retain_grad()
            outputs[name] = y

        return hook

    with ExitStack() as stack:
        for name in layers:
            stack.callback(exact.get_submodule(name).register_forward_hook(keep(name)).remove)
        sequence_losses(exact, ids.cpu()).sum().backward()
    found = {}
    for name in layers:
        gradient = outputs[name].grad
        found[name] = (torch.zeros_like(outputs[name]) if gradient is None else gradient, inputs[name])
    return found

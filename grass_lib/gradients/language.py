"""Outputs of causal language models: one value per sequence, independent of batch mates and of padding."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.gradients.outputs import Batch

IGNORED = -100
"""Label of a token that never counts (the convention of PyTorch's cross-entropy)."""

Reduction = Literal["sum", "mean"]


def causal_loss(model: Callable[..., Any], batch: Batch, reduction: Reduction = "sum") -> Tensor:
    """Cross-entropy of each sequence's own predicted tokens.

    A token is predicted from those before it, so the first one of a sequence never counts, nor does one whose label
    is -100. Nothing is averaged over the batch.

    Args:
        model: Called with everything in the batch but the labels; returns logits ``(batch, length, vocabulary)``, or an
            object that has them as ``.logits``.
        batch: A dict with ``"labels"`` ``(batch, length)`` int64, aligned with the inputs (not shifted).
        reduction: ``"sum"`` over the sequence's tokens, or their ``"mean"``.

    Returns:
        ``(batch,)`` in nats, lower is better; 0 for a sequence without a predicted token.

    Raises:
        UsageError: If the batch or what the model returns has another form.
    """
    following = following_labels(batch, reduction)
    samples: Any = batch
    labels = samples["labels"]
    result = model(**{name: value for name, value in samples.items() if name != "labels"})
    logits = getattr(result, "logits", result)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != labels.shape:
        seen = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(
            f"The model returned {seen} for labels of shape {tuple(labels.shape)}; expected logits (batch, length, "
            "vocabulary)."
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.nn.functional.cross_entropy(
        wide.flatten(0, 1), following.flatten(), ignore_index=IGNORED, reduction="none"
    )
    total = losses.view(labels.shape).sum(dim=1)
    if reduction == "sum":
        return total
    return total / (following != IGNORED).sum(dim=1).clamp_min(1)


def following_labels(batch: Batch, reduction: str = "sum") -> Tensor:
    """The token that each position predicts, -100 where none counts.

    The labels are shifted, not the logits: slicing those would copy the largest tensor there is.

    Args:
        batch: As in :func:`causal_loss`.
        reduction: Checked here for all losses of language models.

    Returns:
        int64 ``(batch, length)``.

    Raises:
        UsageError: If the batch has no labels, or there is no such reduction.
    """
    if reduction not in ("sum", "mean"):
        raise UsageError(f"reduction is {reduction!r}; expected 'sum' or 'mean' (over the tokens of a sequence).")
    if not isinstance(batch, Mapping) or "labels" not in batch:
        seen = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise UsageError(f"A batch of text is a dict with the key 'labels'; this one is {seen}.")
    return torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)


def causal_margin(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Log-odds ``log(p / (1 - p))`` of each sequence, where ``-log p`` is the mean cross-entropy of its tokens.

    Args:
        model: As in :func:`causal_loss`.
        batch: As in :func:`causal_loss`.

    Returns:
        ``(batch,)``, higher is better.

    Raises:
        UsageError: If the batch or what the model returns has another form.
    """
    return log_odds(causal_loss(model, batch, "mean"))


def log_odds(loss: Tensor) -> Tensor:
    """``log(p / (1 - p))`` for ``p = exp(-loss)``, stable for losses from nearly 0 to large.

    Args:
        loss: Any shape, values above 0.

    Returns:
        The same shape.
    """
    return -loss - torch.log(-torch.expm1(-loss))

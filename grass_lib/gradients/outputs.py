"""What is differentiated: one value per sample, computed from a model and a batch.

An output takes ``(model, batch)`` and returns ``(batch,)``. The model is any callable, so that the same function works
on a module and under ``torch.func.functional_call``. A tuple batch is ``(*inputs, labels)``; a dict batch holds the
labels under ``"labels"`` and everything else is passed to the model by name.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from grass_lib.errors import UsageError

Batch: TypeAlias = Sequence[Tensor] | Mapping[str, Tensor]
Output: TypeAlias = Callable[[Callable[..., Tensor], Batch], Tensor]


def margin(model: Callable[..., Tensor], batch: Batch) -> Tensor:
    """Margin of the right class: its logit minus the log-sum-exp of the other logits.

    This is the log-odds ``log(p / (1 - p))`` that TRAK linearises (Park et al. 2023, section 3.2), written so that it
    and its gradient stay finite where the probability p rounds to 1.

    A label that is no class is refused on a CPU. On a GPU, and in a compiled pass, looking at labels would wait for the
    device; there the sample's value and gradient are NaN, which whatever computes gradients refuses. No label is
    ignored, -100 neither: leave such samples out of the batch.

    Args:
        model: Called with the inputs of the batch; returns logits ``(batch, n_classes)``.
        batch: ``(*inputs, labels)`` or a dict with ``"labels"``; labels are class numbers ``(batch,)``.

    Returns:
        ``(batch,)``, higher where the right class is likelier; NaN for a label that is no class, where it is not
        refused.

    Raises:
        UsageError: If logits or labels have another shape or type, there are fewer than two classes, or, on a CPU, a
            label is not from 0 to ``n_classes - 1``.
    """
    logits, labels = _logits_and_labels(model, batch)
    if logits.shape[1] < 2:
        raise UsageError(f"margin needs at least 2 classes, but the model returned logits of shape {_shape(logits)}.")
    _check_classes(labels, logits.shape[1])
    right = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    others = logits.masked_fill(right, -torch.inf).logsumexp(dim=1)
    found = logits.masked_fill(~right, 0.0).sum(dim=1) - others
    # A product, so that the gradient becomes NaN too.
    return found * torch.ones_like(found).masked_fill(~right.any(dim=1), torch.nan)


def cross_entropy(model: Callable[..., Tensor], batch: Batch) -> Tensor:
    """Cross-entropy of the right class for each sample, not averaged over the batch.

    Args:
        model: Called with the inputs of the batch; returns logits ``(batch, n_classes)``.
        batch: ``(*inputs, labels)`` or a dict with ``"labels"``; labels are class numbers ``(batch,)``.

    Returns:
        ``(batch,)`` in nats, lower is better; 0 for the label -100, which PyTorch ignores.

    Raises:
        UsageError: If logits or labels have another shape or type.
    """
    logits, labels = _logits_and_labels(model, batch)
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def output_name(output: Output) -> str:
    """Name of a loss: that of the function, with the arguments that ``functools.partial`` fixed."""
    if isinstance(output, functools.partial):
        fixed = [*map(repr, output.args), *(f"{name}={value!r}" for name, value in sorted(output.keywords.items()))]
        return f"{output_name(output.func)}({', '.join(fixed)})"
    return getattr(output, "__qualname__", type(output).__qualname__)


def check_output(output: Any, argument: str = "output", meaning: str = "") -> None:
    """Refuses what cannot be an output, above all a loss of ``torch.nn``, which takes logits and labels.

    Args:
        output: As it was given.
        argument: Under which name, for the message.
        meaning: Which values are better, for the message.

    Raises:
        UsageError: It is no function, or one of PyTorch's own losses.
    """
    kind = output if isinstance(output, type) else type(output)
    forward = getattr(kind, "forward", None)  # a subclass may have one of its own
    own = getattr(forward, "__module__", None) == "torch.nn.modules.loss"
    named = getattr(torch.nn.functional, getattr(output, "__name__", ""), None)
    own = own or (output is not None and named is output)
    if callable(output) and not own:
        return
    name = getattr(output, "__name__", kind.__name__)
    seen = f"{name}, which takes predictions and labels" if own else repr(output)
    raise UsageError(
        f"{argument} is {seen}; expected a function {argument}(model, batch) -> (batch,)"
        f"{', ' + meaning if meaning else ''}, with one value per sample, for example "
        "grass_lib.gradients.cross_entropy"
    )


def margin_weight(values: Tensor) -> Tensor:
    """One minus the probability of the right class, from margins: the weight of a training sample in TRAK.

    Args:
        values: Margins ``(n,)`` as :func:`margin` returns them.

    Returns:
        ``(n,)`` in [0, 1].
    """
    # sigmoid(-m) rather than 1 - sigmoid(m): the latter rounds to 0 for confident samples.
    return torch.sigmoid(-values)


def _logits_and_labels(model: Callable[..., Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise UsageError(f"A dict batch needs the key 'labels'; this one has {sorted(batch)}.")
        labels = batch["labels"]
        logits = model(**{name: value for name, value in batch.items() if name != "labels"})
    else:
        if len(batch) < 2:
            raise UsageError(f"A tuple batch is (*inputs, labels); this one has {len(batch)} element(s).")
        *inputs, labels = batch
        logits = model(*inputs)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        seen = f"shape {_shape(logits)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(
            f"The model returned {seen}; margin and cross_entropy expect logits (batch, n_classes). "
            "Pass your own output(model, batch) -> (batch,) for other models."
        )
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise UsageError(
            f"Labels have shape {_shape(labels)} and dtype {labels.dtype}; expected integer class numbers (batch,)."
        )
    return logits, labels.long()


def _check_classes(labels: Tensor, n_classes: int) -> None:
    """Refuses labels out of range where they lie in the host's memory."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    try:
        # Under vmap no value can be looked at, but what reads memory by labels checks them itself.
        torch.zeros(n_classes, dtype=torch.bool).gather(0, labels)
    except (RuntimeError, IndexError) as error:
        raise UsageError(
            f"A label is no class of the model ({str(error).splitlines()[0]}); expected class numbers from 0 to "
            f"{n_classes - 1}. Correct it, or leave the sample out: no label is ignored here, -100 neither."
        ) from error


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)

"""Per-sample gradients of all trainable weights, as rows of one matrix."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from grass_lib.devices import usable_device
from grass_lib.errors import GrassError, UsageError
from grass_lib.gradients.attention_masks import whole_masks
from grass_lib.gradients.outputs import Batch, Output, check_output, output_name
from grass_lib.gradients.state import ModelState, ParameterFilter, bind_state, evaluating, trainable_names
from grass_lib.words import few

_SHOWN = 8


class PerSampleGradients:
    """Gradients of an output with respect to the trainable weights, one row per sample.

    Every sample goes through the model as a batch of one (vectorised by ``torch.func.vmap``), in evaluation mode, so
    batch mates cannot influence it. The model is called functionally: its weights, gradients, buffers, modes and
    device stay as they were, also after an exception. Frozen weights are skipped, unused ones give zeros, tied ones
    are counted once, and a module that is used twice contributes the sum of its uses.

    Attributes:
        p: Number of weights that are differentiated: the length of a row.
        width: The same, under the name that all gradients have for the length of their rows.
        names: Their parameter names, in the order in which they lie in a row (that of ``named_parameters()``).
        model_calls: How often the model has been run so far, one per micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        output: Output,
        *,
        micro_batch: int | None = None,
        parameters: ParameterFilter | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Sets the gradients up; nothing is computed yet.

        Args:
            model: The model; its weights may be replaced by a checkpoint's in each call.
            output: ``output(model, batch) -> (batch,)``, the value that is differentiated.
            micro_batch: At most so many samples go through the model at once; None for whole batches.
            parameters: ``parameters(name, parameter) -> bool`` keeps some of the trainable weights; None keeps all.
            device: Where to compute; None for the device of the model's parameters.
            dtype: Of the rows, float32 or float64.

        Raises:
            UsageError: If an argument is out of range or no weight is left to differentiate.
        """
        if not isinstance(model, nn.Module):
            raise UsageError(f"model is a {type(model).__name__}; expected a torch.nn.Module.")
        check_output(output)
        if micro_batch is not None and micro_batch < 1:
            raise UsageError(f"micro_batch is {micro_batch}; expected at least 1, or None for whole batches.")
        if dtype not in (torch.float32, torch.float64):
            raise UsageError(f"Gradients are computed in torch.float32 or torch.float64, not {dtype}.")
        self.model = model
        self.output = output
        self.micro_batch = micro_batch
        self.dtype = dtype
        self.parameters = parameters
        self.names = trainable_names(model, parameters)
        own = dict(model.named_parameters())
        self._shapes = [own[name].shape for name in self.names]
        self.p = self.width = sum(shape.numel() for shape in self._shapes)
        self.device = own[self.names[0]].device if device is None else usable_device(device)
        self.model_calls = 0

    def bind(self, state: Mapping[str, Tensor] | None = None) -> ModelState:
        """Prepares a checkpoint once for many calls.

        Args:
            state: A state dict of the model; None for its present weights.

        Raises:
            UsageError: If the checkpoint does not fit the model.
        """
        return bind_state(self.model, self.names, self.device, state)

    def __call__(
        self,
        state: ModelState | Mapping[str, Tensor] | None,
        batch: Batch,
        *,
        out: Tensor | None = None,
        first: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Computes the rows of one batch.

        Args:
            state: A checkpoint: what :meth:`bind` returned, a state dict, or None for the model's present weights.
            batch: Tuple or dict of tensors with samples on dimension 0.
            out: Where to write the rows, ``(batch, p)``; None allocates.
            first: Position of the first sample in its data set, used in error messages.

        Returns:
            Gradients ``(batch, p)`` and output values ``(batch,)``, in the dtype given at construction.

        Raises:
            UsageError: If the batch or what the output returns has another form, its values have no gradient, or the
                checkpoint does not fit.
            GrassError: If a gradient or value is not finite; the positions of the samples are named.
        """
        bound = state if isinstance(state, ModelState) else self.bind(state)
        samples = batch_to(batch, self.device)
        n = batch_size(samples)
        if out is None:
            out = torch.empty(n, self.p, device=self.device, dtype=self.dtype)
        elif out.shape != (n, self.p) or out.dtype != self.dtype or out.device.type != self.device.type:
            raise UsageError(
                f"out is {tuple(out.shape)} {out.dtype} on {out.device}; "
                f"expected {(n, self.p)} {self.dtype} on {self.device}."
            )
        values = torch.empty(n, device=self.device, dtype=self.dtype)
        step = self.micro_batch or max(n, 1)
        with evaluating(self.model), torch.no_grad():
            for start in range(0, n, step):
                stop = min(start + step, n)
                self.fill(bound, batch_slice(samples, start, stop), out[start:stop], values[start:stop])
        check_finite(out, values, first)
        return out, values

    def fill(self, state: ModelState, samples: Batch, rows: Tensor, values: Tensor, *, masked: bool = False) -> None:
        """One micro-batch, without the checks and the evaluation mode of a call.

        Args:
            state: From `bind`.
            samples: On the device.
            rows: Is written to, ``(batch, p)``.
            values: Is written to, ``(batch,)``.
            masked: Whether the caller keeps coordinates; messages then do not advise to do so.

        Raises:
            UsageError: The model or the output does what ``torch.func.vmap`` cannot, or the output returns another
                form, or values without a gradient.
        """
        tracked = True

        def value_of(trainable: dict[str, Tensor], sample: Batch) -> Tensor:
            nonlocal tracked
            # Cloned inside the transform, so that a forward pass that counts in a buffer changes a copy.
            buffers = {name: value.clone() for name, value in state.buffers.items()}

            def call(*args: Any, **kwargs: Any) -> Tensor:
                return functional_call(self.model, (trainable, state.fixed, buffers), args, kwargs)

            value = self.output(call, _batch_of_one(sample))
            if not isinstance(value, Tensor) or value.shape != (1,):
                seen = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise UsageError(
                    f"output returned {seen} for a batch of one; expected one value per sample, shape (1,). "
                    "Do not average over the batch."
                )
            tracked = value.requires_grad
            return value[0]

        self.model_calls += 1
        try:
            with whole_masks():
                gradients, found = vmap(grad_and_value(value_of), in_dims=(None, 0))(state.trainable, samples)
        except RuntimeError as error:
            reason = _why_not(error, self.model, masked=masked)
            if reason is None:
                raise
            raise UsageError(reason) from error
        if not tracked:
            refuse_detached(self.model, self.output, state, batch_slice(samples, 0, 1))
        values.copy_(found)
        offset = 0
        for name, shape in zip(self.names, self._shapes, strict=True):
            size = shape.numel()
            # Written straight into the row, one tensor at a time, and let go: there is no second copy of all gradients.
            rows[:, offset : offset + size].view(len(rows), *shape).copy_(gradients.pop(name))
            offset += size


def batch_to(batch: Any, device: torch.device) -> Batch:
    """A batch as a plain tuple or dict of tensors on a device.

    Raises:
        UsageError: If it is no tuple, list or dict of tensors.
    """
    if isinstance(batch, Mapping):
        items: list[tuple[Any, Any]] = list(batch.items())
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        items = list(enumerate(batch))
    else:
        raise UsageError(f"A batch is a {type(batch).__name__}; expected a tuple or dict of tensors.")
    for name, value in items:
        if not isinstance(value, Tensor) or value.dim() == 0:
            seen = "a tensor without dimensions" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UsageError(f"Element {name!r} of a batch is {seen}; expected a tensor with samples on dimension 0.")
    moved = {name: value.to(device, non_blocking=True) for name, value in items}
    return moved if isinstance(batch, Mapping) else tuple(moved.values())


def batch_size(batch: Batch) -> int:
    """Number of samples in a batch.

    Raises:
        UsageError: If its tensors disagree, or there are none.
    """
    tensors = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) != 1:
        raise UsageError(f"The tensors of a batch have lengths {sorted(sizes)}; expected one common number of samples.")
    return sizes.pop()


def batch_slice(batch: Batch, start: int, stop: int) -> Batch:
    """Samples ``start`` to ``stop`` of a batch."""
    if isinstance(batch, Mapping):
        return {name: value[start:stop] for name, value in batch.items()}
    return tuple(value[start:stop] for value in batch)


def _batch_of_one(sample: Batch) -> Batch:
    if isinstance(sample, Mapping):
        return {name: value.unsqueeze(0) for name, value in sample.items()}
    return tuple(value.unsqueeze(0) for value in sample)


def check_finite(rows: Tensor, values: Tensor, first: int) -> None:
    """Looks for samples whose row or value is not finite.

    Args:
        rows: ``(batch, width)``.
        values: ``(batch,)``.
        first: Position of the first sample in its data set.

    Raises:
        GrassError: There are some; their positions are named.
    """
    # One cheap reduction in the usual case; the exact test runs only where a sum is not finite (it may have
    # overflowed).
    if bool(torch.isfinite(rows.sum(dim=1) + values).all()):
        return
    bad = torch.nonzero(~(torch.isfinite(rows).all(dim=1) & torch.isfinite(values))).flatten()
    if len(bad) == 0:
        return
    shown = few((bad + first).tolist(), _SHOWN)
    raise GrassError(
        f"The gradient or output of {len(bad)} sample(s) is not finite, at position(s) {shown}; "
        "look at these samples, or use a numerically stable output such as grass_lib.gradients.margin."
    )


def refuse_detached(model: nn.Module, output: Output, state: ModelState, samples: Batch) -> None:
    """Refuses an output whose values have no gradient; to be called where they have none for the chosen weights.

    Args:
        model: In evaluation mode; is run once.
        output: What is differentiated.
        state: The weights.
        samples: A batch, on the device of the weights.

    Raises:
        UsageError: The values depend on no trainable weight of the model, chosen or not.
    """
    chosen = state.trainable.keys() | {name for name, own in model.named_parameters() if own.requires_grad}
    weights = {
        name: value.detach().requires_grad_(name in chosen) for name, value in (state.trainable | state.fixed).items()
    }
    buffers = {name: value.clone() for name, value in state.buffers.items()}

    def call(*args: Any, **kwargs: Any) -> Tensor:
        return functional_call(model, (weights, buffers), args, kwargs)

    with torch.enable_grad():
        values = output(call, samples)
    if not values.requires_grad:
        raise UsageError(
            f"the values of output {output_name(output)} have no gradient with respect to any trainable weight of "
            f"{type(model).__name__}: they are detached or computed without gradients (torch.no_grad, .item(), NumPy). "
            "Compute them from what the model returns, by operations that PyTorch differentiates"
        )


def _why_not(error: RuntimeError, model: nn.Module, *, masked: bool) -> str | None:
    """What ``torch.func.vmap`` cannot do, and the ways out; None for an error that is not about vmap."""
    text, kind = str(error), type(model).__name__
    if "embedding_renorm_" in text:
        return (
            f"{kind} cannot give each sample its gradient: {_embeddings(model, 'max_norm')} rescales its weights while "
            "the model runs, which torch.func.vmap cannot do. Rescale them once, and set max_norm of the layer to None"
        )
    if "SparseCPU" in text or "SparseCUDA" in text:
        return (
            f"{kind} cannot give each sample its gradient: {_embeddings(model, 'sparse')} gives sparse gradients, "
            "which torch.func.vmap does not know. Set sparse of the layer to False: the numbers are the same"
        )
    theirs = (
        "for a model of transformers, load it with attn_implementation='eager', or leave attention_mask and "
        "position_ids out of the batch"
    )
    mask = "begin the spec with a mask, for example random_mask-16384->sjlt-4096"
    if ".item()" in text or "Cannot access data pointer" in text:
        last = "" if masked else f". If only the model does so, you may also {mask}"
        return (
            f"{kind} or its output looks at the values of a tensor (.item(), .tolist(), NumPy, or an if), which cannot "
            "be differentiated for each sample by torch.func.vmap; use operations on tensors instead, such as "
            f"torch.where ({theirs}){last}"
        )
    if not text.startswith("vmap: "):
        return None
    reason = text.removeprefix("vmap: ").split("\n", 1)[0].split(". ", 1)[0].rstrip(".")
    last = "" if masked else f", or {mask}"
    return f"{kind} cannot give each sample its gradient by torch.func.vmap: {reason}; change that ({theirs}){last}"


def _embeddings(model: nn.Module, option: str) -> str:
    """An embedding with an option, in words."""
    found = [(name, value) for name, module in model.named_modules() if (value := getattr(module, option, None))]
    return f"layer '{found[0][0]}' with {option}={found[0][1]}" if found else f"an embedding with {option}"

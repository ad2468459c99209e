"""Kept coordinates of per-sample gradients, without the full gradient."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from grass_lib.errors import UsageError
from grass_lib.gradients.coordinates import KeptPart, check_indices, split_coordinates
from grass_lib.gradients.full import (
    PerSampleGradients,
    batch_size,
    batch_slice,
    batch_to,
    check_finite,
    refuse_detached,
)
from grass_lib.gradients.masked_formulas import masked_layer
from grass_lib.gradients.masked_graph import Recordings, Shared
from grass_lib.gradients.masked_layers import MaskedLayer
from grass_lib.gradients.masked_pass import Found, MaskedPass, RowWriter
from grass_lib.gradients.outputs import Batch, Output
from grass_lib.gradients.state import ModelState, ParameterFilter, evaluating
from grass_lib.kernels import nvrtc

SampledBackend = Literal["torch", "kernel"]
_LOG = logging.getLogger(__name__)


class MaskedGradients:
    """Per-sample gradients at chosen coordinates only; the numbers are those of :class:`PerSampleGradients`.

    One forward and backward pass runs over a whole micro-batch with all weights frozen. Linear layers and convolutions
    compute kept coordinates from their inputs and output gradients, norms and embeddings by their formulas. What is
    held is the activations and ``(batch, k)``, never ``(batch, p)``. A parameter of any other layer goes *the general
    way*: its whole per-sample gradient is formed (by ``torch.func.vmap``) and the kept coordinates are taken from it.

    A model may use a weight beside its layer's call, or let samples of a batch influence each other. Both are looked
    for in the first batch by a few extra backward passes, exactly: parameters that are concerned, or all, then go the
    general way. Where fewer than two samples of that batch have a gradient, the next batch is looked at too. `routes`
    shows the way of a parameter, and a warning is logged. Modules used twice add up, tied weights too, unused ones give
    zeros. The model is left as it is found, also after an exception.

    On a GPU the pass is hundreds of short kernels, and Python is slower than they are. A micro-batch whose shape comes
    for the second time is therefore recorded as a CUDA graph, and replayed from the third on, for any checkpoint: its
    weights and buffers are copied into those that the recording reads. At most four shapes are recorded, with settings
    such as TF32 as part of the shape; the last, smaller micro-batch of a walk runs as it is until it recurs. The first
    replay must give what the pass gives. A model that waits for the device, or a parameter that goes the general way,
    leaves everything as it is, the former with a warning. What is recorded is what the GPU does: a model whose forward
    depends on anything else that changes between calls, such as attributes of Python, tensors that are no registered
    buffers, or hooks, needs ``graph=False``.

    Recordings hold the memory of one pass (they share it), one copy of the weights, and the rows and inputs of each
    micro-batch until this object is gone; with `keeping` only the copy of the weights is shared.

    Attributes:
        p: Number of weights that are differentiated: the length of a full row.
        k: Number of kept coordinates: the length of a row here.
        width: The same, under the name that all gradients have for the length of their rows.
        indices: The coordinates, int64 ``(k,)`` on the CPU.
        names: Parameter names in the order of a full row.
        backend: Who computes linear layers and convolutions.
    """

    def __init__(
        self,
        model: nn.Module,
        output: Output,
        indices: Tensor,
        *,
        micro_batch: int | None = None,
        parameters: ParameterFilter | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        backend: SampledBackend = "torch",
        graph: bool = True,
    ) -> None:
        """Sets the gradients up; nothing is computed yet.

        Args:
            model: The model; its weights may be replaced by a checkpoint's in each call.
            output: ``output(model, batch) -> (batch,)``, the value that is differentiated.
            indices: int64 ``(k,)``, ascending and distinct: places in the full row of :class:`PerSampleGradients`. The
                union of several masks serves them all in one pass.
            micro_batch: At most so many samples go through the model at once; None for whole batches.
            parameters: As in :class:`PerSampleGradients`.
            device: Where to compute; None for the device of the model's parameters.
            dtype: Of the rows, float32 or float64; half types are added in float32.
            backend: "torch" anywhere, or "kernel" on a CUDA GPU, for activations up to float32.
            graph: Records passes as CUDA graphs where their shapes recur. Ignored on a CPU.

        Raises:
            UsageError: If an argument is out of range.
        """
        self._full = PerSampleGradients(
            model, output, micro_batch=micro_batch, parameters=parameters, device=device, dtype=dtype
        )
        self.model, self.output, self.micro_batch, self.dtype = model, output, micro_batch, dtype
        self.p, self.names, self.device = self._full.p, self._full.names, self._full.device
        if backend not in ("torch", "kernel"):
            raise UsageError(f"backend is {backend!r}; expected 'torch' or 'kernel'.")
        if backend == "kernel" and self.device.type != "cuda":
            raise UsageError(
                f"backend='kernel' needs a CUDA GPU, and the device is {self.device}; use backend='torch'."
            )
        if backend == "kernel" and (reason := nvrtc.missing_for_kernels()) is not None:
            raise UsageError(f"backend='kernel' cannot run: {reason}. Use backend='torch'.")
        self.backend: SampledBackend = backend
        self._history = _History()
        self._recordings = Recordings(self.device, Shared()) if graph and self.device.type == "cuda" else None
        self._take(indices)

    def keeping(self, indices: Tensor) -> MaskedGradients:
        """The same gradients at other coordinates.

        What was found out about the model, and the count of its calls, are shared; recordings are not.

        Args:
            indices: As at construction.

        Raises:
            UsageError: If the indices are out of range or not ascending.
        """
        other = object.__new__(MaskedGradients)
        other.__dict__.update(self.__dict__)
        other._recordings = None if self._recordings is None else self._recordings.renewed()
        other._take(indices)
        return other

    @property
    def model_calls(self) -> int:
        """How often the model has been run so far."""
        return self._history.calls

    @property
    def recorded(self) -> int:
        """How many shapes of micro-batches are recorded as CUDA graphs by now."""
        return 0 if self._recordings is None else len(self._recordings)

    @property
    def routes(self) -> dict[str, str]:
        """By parameter with kept coordinates: "layer", or "general" where its whole gradient is formed."""
        return {name: "general" if name in self._general else "layer" for name in self._parts}

    @property
    def general_weights(self) -> int:
        """How many weights go the general way: a sample's gradient with respect to all of them is formed."""
        general = self._general | (self._history.general & self._parts.keys())
        return sum(self._parts[name].shape.numel() for name in general)

    def bind(self, state: Mapping[str, Tensor] | None = None) -> ModelState:
        """Prepares a checkpoint once for many calls; see :meth:`PerSampleGradients.bind`."""
        return self._full.bind(state)

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
            out: Where to write the rows, ``(batch, k)``; None allocates.
            first: Position of the first sample in its data set, used in error messages.

        Returns:
            Gradients ``(batch, k)`` and output values ``(batch,)``, in the dtype given at construction.

        Raises:
            UsageError: If the batch or what the output returns has another form, its values have no gradient, or the
                checkpoint does not fit.
            GrassError: If a kept coordinate or a value is not finite; the positions of the samples are named.
        """
        bound = state if isinstance(state, ModelState) else self.bind(state)
        samples = batch_to(batch, self.device)
        n = batch_size(samples)
        if out is None:
            out = torch.empty(n, self.k, device=self.device, dtype=self.dtype)
        elif out.shape != (n, self.k) or out.dtype != self.dtype or out.device.type != self.device.type:
            raise UsageError(
                f"out is {tuple(out.shape)} {out.dtype} on {out.device}; "
                f"expected {(n, self.k)} {self.dtype} on {self.device}."
            )
        values = torch.empty(n, device=self.device, dtype=self.dtype)
        step = self.micro_batch or max(n, 1)
        if self._recordings is not None:
            self._recordings.begin()
        with evaluating(self.model), torch.no_grad():
            for start in range(0, n, step):
                stop = min(start + step, n)
                self._fill(bound, batch_slice(samples, start, stop), out[start:stop], values[start:stop])
        check_finite(out, values, first)
        return out, values

    def _fill(self, state: ModelState, samples: Batch, rows: Tensor, values: Tensor) -> None:
        recordings = self._recordings
        if recordings is None or not recordings.recurs(samples) or not self._settled(len(rows)):
            self._fill_as_it_is(state, samples, rows, values)
        elif recordings(state, samples, rows, values, eager=self._fill_as_it_is, step=self._fill_by_layers):
            self._history.calls += 1

    def _settled(self, n: int) -> bool:
        """Whether nothing is left to be found out about the model, and layers give all that is asked for."""
        # A single sample has no mates: whether samples mix shows in the first batch of several.
        known = self._history.samples if n > 1 else self._history.weights
        return bool(self._layers) and not self._general and self._layers.keys() <= known

    def _fill_as_it_is(self, state: ModelState, samples: Batch, rows: Tensor, values: Tensor) -> bool:
        """Fills one micro-batch; returns whether all of it was filled by layers."""
        n, done, odd = len(rows), False, False
        while self._layers and not done:
            known = self._history.samples if n > 1 else self._history.weights
            check = not self._layers.keys() <= known
            self._history.calls += 1
            found = self._pass(state, self.output, samples, n, check=check)
            done = self._put(found, rows, values)
            if done:
                self._history.weights.update(self._layers)
                self._history.samples.update(self._layers if n > 1 and found.checked else ())
                answered = any(gradient is not None for gradient in found.gradients.values())
                if not (answered or self._history.answered):
                    refuse_detached(self.model, self.output, state, samples)
                self._history.answered |= answered
            else:
                odd = not (found.problems or found.mixed)
                self._demote(found)
        if self._general or not done:
            self._fill_generally(state, samples, rows, values)
            if odd:  # said only where it matters: most outputs that average over the batch have just been refused
                _LOG.warning("Whole gradients are formed for all parameters: the output has not one value each.")
            return False
        return True

    def _fill_by_layers(self, state: ModelState, samples: Batch, rows: Tensor, values: Tensor) -> bool:
        """Fills one micro-batch by layers alone; returns whether that was possible."""
        return self._put(self._pass(state, self.output, samples, len(rows), check=False), rows, values)

    def _put(self, found: Found, rows: Tensor, values: Tensor) -> bool:
        """Writes what a pass gave, where it gave something."""
        if found.problems or found.mixed or found.values is None:
            return False
        values.copy_(found.values)
        self._write(found.gradients, rows)
        return True

    def _fill_generally(self, state: ModelState, samples: Batch, rows: Tensor, values: Tensor) -> None:
        chosen = self._general or set(self._parts)
        whole = PerSampleGradients(
            self.model, self.output, parameters=lambda name, _: name in chosen, device=self.device, dtype=self.dtype
        )
        weights = {**state.trainable, **state.fixed}
        trainable = {name: weights[name] for name in whole.names}
        fixed = {name: value for name, value in weights.items() if name not in trainable}
        gradients = torch.empty(len(rows), whole.p, device=self.device, dtype=self.dtype)
        whole.fill(ModelState(trainable, fixed, state.buffers), samples, gradients, values, masked=True)
        self._history.calls += 1
        offset = 0
        for name in whole.names:
            part, size = self._parts[name], weights[name].numel()
            local = part.local.to(self.device)
            rows[:, part.columns] = gradients[:, offset : offset + size].index_select(1, local)
            offset += size

    def _demote(self, found: Found) -> None:
        """Sends parameters the general way."""
        history = self._history
        # Recordings read tables of the layers, which are about to be made anew.
        self._recordings = None if self._recordings is None else self._recordings.renewed()
        if found.problems:
            for layer, reason in found.problems.items():
                names = {part.name for part in self._layers[layer].parts.values()}
                history.general |= names
                _LOG.warning("Whole gradients are formed for %s: layer '%s': %s.", sorted(names), layer, reason)
        else:
            history.general |= set(self.names)
            if found.mixed:
                _LOG.warning("Whole gradients are formed for all parameters: samples of a batch influence each other.")
        self._group()

    def _take(self, indices: Tensor) -> None:
        own = dict(self.model.named_parameters())
        self.indices = check_indices(indices, self.p)
        self.k = self.width = len(self.indices)
        self._parts = split_coordinates(self.indices, {name: own[name].shape for name in self.names})
        self._group()

    def _group(self) -> None:
        """Sorts the parameters with kept coordinates into layers, and those that go the general way."""
        first_names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        general = self._history.general & self._parts.keys()
        owned: dict[str, tuple[nn.Module, dict[str, KeptPart]]] = {}
        for module_name, module in self.model.named_modules():
            parts = {
                attribute: self._parts[name]
                for attribute, parameter in module._parameters.items()
                if parameter is not None and (name := first_names[id(parameter)]) in self._parts
            }
            if parts:
                owned[module_name] = module, parts
        layers: dict[str, MaskedLayer] = {}
        for module_name, (module, parts) in owned.items():
            made = masked_layer(module_name, module, parts, self.device, kernel=self.backend == "kernel")
            if made is None:
                general |= {part.name for part in parts.values()}
            else:
                layers[module_name] = made
        for module_name, (module, parts) in owned.items():
            # A tied weight of which one place is no supported layer goes the general way in all its places.
            left = {attribute: part for attribute, part in parts.items() if part.name not in general}
            if module_name in layers and len(left) < len(parts):
                del layers[module_name]
                made = masked_layer(module_name, module, left, self.device, kernel=self.backend == "kernel")
                if left and made is not None:
                    layers[module_name] = made
        self._layers, self._general = layers, general
        self._pass, self._write = MaskedPass(self.model, layers), RowWriter(layers, self.k)


class _History:
    """What was found out about a model so far, and how often it was run."""

    def __init__(self) -> None:
        self.calls, self.answered = 0, False  # whether any weight has had a gradient
        self.general: set[str] = set()
        # Layers whose weights are used in their calls alone, and layers in which samples were seen not to mix.
        self.weights: set[str] = set()
        self.samples: set[str] = set()

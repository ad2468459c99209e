"""Compressed per-sample gradients of chosen layers, captured while one backward pass runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from grass_lib.errors import SpecError, UsageError
from grass_lib.gradients.capture import NORMS, LayerCapture
from grass_lib.gradients.full import batch_size, batch_to
from grass_lib.gradients.graph import RecordedStep, shapes_of
from grass_lib.gradients.layers import LayerChoice, LayerShape, find_layers, output_layer
from grass_lib.gradients.meter import Meter, measured
from grass_lib.gradients.outputs import Batch, Output
from grass_lib.gradients.sides import Side, build_side
from grass_lib.gradients.state import evaluating
from grass_lib.projection import Mask, Projector, build_projector
from grass_lib.specs import CompressionSpec, StageSpec

LayerMasks: TypeAlias = Mapping[str, Mask | str | Path]


class FactoredGradients:
    """Per-sample gradients of layers' weights, compressed on both sides before they are formed (sections 3.2 and 3.3).

    A layer's weight gradient is ``sum_t delta_t x_t^T``: gradients of its outputs times its inputs (with a 1 appended
    for the bias). Stage 1 shortens ``delta`` and ``x``, the sum over tokens follows, stage 2 shortens the flattened
    ``(k1, k2)`` matrix. Weights are frozen while gradients are captured, so that nothing is computed for them, nothing
    below the lowest captured layer, and of each input only the kept columns stay for the backward pass.

    Samples must not influence each other: the model runs in evaluation mode, and every layer must have samples on
    dimension 0. Afterwards the model is as it was found, also after an exception.

    Stage 1 of the layer ``name`` takes its numbers from the random streams ``name/output`` and ``name/input``, stage 2
    from ``name``. Norms have no input side to shorten: weight and bias stay beside each other. A mask that asks for as
    many coordinates as a side has keeps all; stage 2 is left out where it would not make a layer's gradient shorter.

    Attributes:
        model: The model.
        spec: The compression.
        layers: Captured layers by module name, in the order of the model.
        sizes: Compressed size of each.
        k: Their sum.
        include_head: Whether the output layer of a language model is among them.
        device: Where gradients are computed.
        compiled_size: Samples in a batch for which the compiled pass or the recorded step is used, as many as in the
            first batch where it is not set; other batches run as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Output,
        *,
        layers: LayerChoice = "linear",
        include_head: bool = False,
        sparsification: str = "identity",
        projection: str = "identity",
        seed: int = 0,
        device: str | torch.device | None = None,
        masks: LayerMasks | None = None,
        backend: str = "auto",
        compile: bool = False,
        graph: bool | None = None,
        dtype: torch.dtype = torch.float32,
        timed: bool = True,
    ) -> None:
        """Chooses the layers and draws the random maps; the model is not touched.

        Args:
            model: The model, on the device where gradients are computed.
            loss: ``loss(model, batch) -> (batch,)``, the value that is differentiated.
            layers: Which layers; see `find_layers`.
            include_head: Whether kinds take a language model's output layer too.
            sparsification: Stage 1: factored, ``TYPE-DIM*DIM``, or identity.
            projection: Stage 2: flat, ``TYPE-DIM``, or identity.
            seed: Of the random maps.
            device: None for the device of the model's parameters; anything else must be that device.
            masks: For selective types: by side, ``{"layer/output": Mask, "layer/input": Mask}``.
            backend: Of stage 2, as in ``build_projector``.
            compile: Runs forward and backward pass through ``torch.compile``.
            graph: Records the whole step as a CUDA graph at the first batch of `compiled_size` samples and replays it,
                so that a GPU never waits for Python; None where ``compile`` is on. Ignored on a CPU.
            dtype: Of the results, float32 or float64.
            timed: Measures the time of stage 1 (not of a compiled or recorded step, whose parts cannot be told apart).

        Raises:
            SpecError: The compression is flat in its first stage, or does not fit a layer.
            UsageError: Another argument does not fit.
        """
        if dtype not in (torch.float32, torch.float64):
            raise UsageError(f"gradients are given in torch.float32 or torch.float64, not {dtype}")
        self.spec = CompressionSpec.parse(sparsification=sparsification, projection=projection)
        first = self.spec.sparsification
        if not (first.is_identity or first.is_factored):
            raise SpecError(
                f"sparsification {first} is flat; expected a factored one such as {first.family}-{first.k}*{first.k}, "
                "or identity"
            )
        self.model, self.loss, self.dtype = model, loss, dtype
        self.device = _device_of(model, device)
        shapes = find_layers(model, layers, include_head=include_head)
        head = output_layer(model)
        self.include_head = head is not None and head in shapes
        modules = dict(model.named_modules())
        self._captures: dict[str, LayerCapture] = {}
        self._stage2s: dict[str, Projector | None] = {}
        unused = set(masks or ())
        for name, shape in shapes.items():
            out = self._side(name, "output", shape, seed, masks, unused)
            into = self._side(name, "input", shape, seed, masks, unused)
            weight = next(modules[name].parameters(recurse=False))
            self._captures[name] = LayerCapture(name, shape, out, into, weight.dtype)
            self._stage2s[name] = self._build_stage2(name, self._captures[name].size, seed, backend)
        if unused:
            raise UsageError(
                f"masks has entries for {', '.join(sorted(unused)[:4])}, which {self.spec} does not use here; "
                "expected 'LAYER/output' and 'LAYER/input' of captured layers with a selective type"
            )
        self.layers: dict[str, LayerShape] = shapes
        self.sizes = {
            name: capture.size if (second := self._stage2s[name]) is None else second.k
            for name, capture in self._captures.items()
        }
        self.k = sum(self.sizes.values())
        self._modules = modules
        self._probes: dict[str, Tensor] = {}
        self._depth = 0
        self._graph = self.device.type == "cuda" and (compile if graph is None else graph)
        self._recorded: tuple[Any, RecordedStep] | None = None
        self._meter = Meter(self.device) if timed and not (compile or self._graph) else None
        self._stage2_meter: Meter | None = Meter(self.device)
        self._total_meter: Meter | None = Meter(self.device)
        self._compiled: Any = torch.compile(_evaluate, dynamic=False) if compile else None
        self.compiled_size: int | None = None

    @property
    def backends(self) -> dict[str, str]:
        """Who computes stage 2, by layer; "none" where there is no stage 2."""
        return {name: "none" if second is None else second.backend for name, second in self._stage2s.items()}

    def sides(self, name: str) -> tuple[Side, Side]:
        """The maps of a layer's output and input side.

        Args:
            name: Of a captured layer.
        """
        return self._captures[name].out, self._captures[name].into

    def stage2(self, name: str) -> Projector | None:
        """The projector of a layer's flattened ``(k1, k2)`` matrix; None where there is none."""
        return self._stage2s[name]

    @property
    def timings(self) -> dict[str, float]:
        """Seconds so far: ``gradients`` (forward and backward pass) and ``compression`` (both stages).

        Stage 1 of a compiled pass cannot be told apart; it counts with the gradients. Recorded steps do not count.
        """
        first, total, second = (
            0.0 if meter is None else meter.seconds for meter in (self._meter, self._total_meter, self._stage2_meter)
        )
        return {"gradients": max(0.0, total - first), "compression": first + second}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks the layers, freezes the weights and puts the model in evaluation mode, until the block is left.

        Calls attach by themselves; a loop of many calls, above all a compiled one, is faster inside one block. Blocks
        may be nested.
        """
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        with ExitStack() as stack:
            flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
            stack.callback(_restore, flags)
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            stack.enter_context(evaluating(self.model))
            for name, capture in self._captures.items():
                handle = self._modules[name].register_forward_hook(self._hook(capture), with_kwargs=True)
                stack.callback(handle.remove)
            self._depth = 1
            stack.callback(setattr, self, "_depth", 0)
            yield

    def __call__(self, batch: Batch, *, output: Output | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """Captures the compressed gradients of one batch.

        Args:
            batch: Tuple or dict of tensors with samples on dimension 0.
            output: Another output to differentiate instead of the loss.

        Returns:
            Gradients ``{layer: (batch, k_l)}`` in the dtype of the construction, zeros for layers that the pass did not
            use, and values ``(batch,)``. They are not checked for finiteness.

        Raises:
            UsageError: If the batch, what the output returns or a layer's output has another form.
        """
        samples = batch_to(batch, self.device)
        n = batch_size(samples)
        if self.compiled_size is None:
            self.compiled_size = n
        regular = n == self.compiled_size and output is None
        if regular and self._graph and self._recorded is not None and self._recorded[0] == shapes_of(samples):
            return self._recorded[1](samples)
        with self.attached():
            if regular and self._graph and self._recorded is None:
                with self._unmetered():
                    step = RecordedStep(lambda inputs: self._step(self.loss, inputs, n), samples)
                self._recorded = shapes_of(samples), step
                return step(samples)
            return self._step(output or self.loss, samples, n)

    def _step(self, output: Output, samples: Batch, n: int) -> tuple[dict[str, Tensor], Tensor]:
        with torch.enable_grad(), measured(self._total_meter):
            found, values = self._pass(output, samples, n)
        gradients: dict[str, Tensor] = {}
        with measured(self._stage2_meter):
            for (name, second), row in zip(self._stage2s.items(), found, strict=True):
                rows = torch.zeros(n, self._captures[name].size, device=self.device) if row is None else row
                gradients[name] = (rows if second is None else second(rows)).to(self.dtype)
        return gradients, values.detach()

    @contextmanager
    def _unmetered(self) -> Iterator[None]:
        meters = self._meter, self._total_meter, self._stage2_meter
        self._meter = self._total_meter = self._stage2_meter = None
        try:
            yield
        finally:
            self._meter, self._total_meter, self._stage2_meter = meters

    def _pass(self, output: Output, samples: Batch, n: int) -> tuple[list[Tensor | None], Tensor]:
        # Expanded from one number: a probe has a shape and a gradient, but no memory.
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        zero = torch.zeros(1, device=self.device, dtype=wide)
        self._probes = {name: zero.expand(n, capture.size).requires_grad_() for name, capture in self._captures.items()}
        compiled = self._compiled if n == self.compiled_size else None
        try:
            values = (compiled or _evaluate)(output, self.model, samples)
            if not isinstance(values, Tensor) or values.shape != (n,):
                seen = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise UsageError(
                    f"loss returned {seen} for {n} samples; expected one value per sample, shape ({n},). Do not "
                    "average over the batch."
                )
            if not values.requires_grad:
                return [None] * len(self._probes), values
            found = torch.autograd.grad(values.sum(), list(self._probes.values()), allow_unused=True)
        finally:
            self._probes = {}
        return list(found), values

    def _hook(self, capture: LayerCapture) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor | None:
            probe = self._probes.get(capture.name)
            if probe is None:
                return None
            x = args[0] if args else next(iter(kwargs.values()))
            return capture.apply(module, x, y, probe, None if torch.compiler.is_compiling() else self._meter)

        return hook

    def _side(
        self, name: str, side: str, shape: LayerShape, seed: int, masks: LayerMasks | None, unused: set[str]
    ) -> Side:
        stage = self.spec.sparsification
        if shape.kind in NORMS and side == "input":
            stage = StageSpec("identity")
        place = 0 if side == "output" else 1
        key, d = f"{name}/{side}", shape.d_out if place == 0 else shape.d_in
        mask = (masks or {}).get(key)
        unused.discard(key)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return build_side(
            stage,
            place,
            d,
            name=key,
            seed=seed,
            device=self.device,
            dtype=wide,
            mask=Mask.load(mask) if isinstance(mask, str | Path) else mask,
        )

    def _build_stage2(self, name: str, size: int, seed: int, backend: str) -> Projector | None:
        stage = self.spec.projection
        if stage.k is None or stage.k >= size:
            return None
        return build_projector(stage, size, seed=seed, name=name, device=self.device, dtype=self.dtype, backend=backend)


def _evaluate(output: Output, model: nn.Module, samples: Batch) -> Tensor:
    return output(model, samples)


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _device_of(model: nn.Module, device: str | torch.device | None) -> torch.device:
    first = next(model.parameters(), None)
    if first is None:
        raise UsageError(f"the {type(model).__name__} has no weights; expected a model with layers to capture")
    if device is not None and torch.empty(0, device=device).device != first.device:
        raise UsageError(f"the model is on {first.device}, and device is {device}; move the model there first")
    return first.device

"""Compressed per-sample gradients of chosen layers, captured while one backward pass runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grass_lib.devices import device_of_model
from grass_lib.errors import SpecError, UsageError
from grass_lib.gradients.capture import LayerCapture
from grass_lib.gradients.fp8 import check_fp8
from grass_lib.gradients.full import batch_size, batch_to
from grass_lib.gradients.graph import RecordedStep, shapes_of
from grass_lib.gradients.layers import LayerChoice, LayerShape, doubts, find_layers, longer, output_layer
from grass_lib.gradients.maps import LayerMaps, LayerMasks, LayerMatrices
from grass_lib.gradients.meter import StepClock, measured
from grass_lib.gradients.outputs import Batch, Output, check_output
from grass_lib.gradients.passes import Captured, CapturePass, Compile, Sides
from grass_lib.gradients.sides import Side
from grass_lib.gradients.together import Together
from grass_lib.kernels.columns import check_columns
from grass_lib.projection import Projector
from grass_lib.seeds import check_seed
from grass_lib.specs import CompressionSpec
from grass_lib.words import few

logger = logging.getLogger(__name__)


class FactoredGradients:
    """Per-sample gradients of layers' weights, compressed on both sides before they are formed (sections 3.2 and 3.3).

    A layer's weight gradient is ``sum_t delta_t x_t^T``: gradients of its outputs times its inputs (with a 1 appended
    for the bias). Stage 1 shortens ``delta`` and ``x``, the sum over tokens follows, stage 2 shortens the flattened
    ``(k1, k2)`` matrix. Weights are frozen while gradients are captured, so that nothing is computed for them, nothing
    below the lowest captured layer, and of each input only the kept columns stay for the backward pass.

    Samples must not influence each other: the model runs in evaluation mode, and every layer must have samples on
    dimension 0. Afterwards the model is as it was found, also after an exception, but for buffers that its own forward
    pass changes. Before the first batch a pass over one sample looks at the layers: all must have samples on dimension
    0, and one whose class has a forward of its own is compared with its kind.

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
        fp8: Whether the products of the blocks' linear layers run in FP8.
        device: Where gradients are computed.
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
        matrices: LayerMatrices | None = None,
        backend: str = "auto",
        compile: Compile = False,
        graph: bool | None = None,
        dtype: torch.dtype = torch.float32,
        timed: bool = True,
        fp8: bool = False,
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
            matrices: Instead of drawn ones, above all those of another system: ``{"layer/output": (d_out, k1),
                "layer/input": (d_in, k2)}`` (the bias is the last row of an input side) in place of the dense type that
                ``sparsification`` names, and ``{"layer": (k1 * k2, k)}`` in place of ``projection``. What has no entry
                is drawn.
            backend: Of stage 2, as in ``build_projector``.
            compile: Runs forward and backward pass through ``torch.compile``; ``"blocks"`` compiles one block of a
                model of many equal ones, for large models.
            graph: Records the whole step as a CUDA graph at the first batch of `compiled_size` samples and replays it,
                so that a GPU never waits for Python; None where ``compile`` is True. Ignored on a CPU.
            dtype: Of the results, float32 or float64.
            timed: Measures the time of stage 1 (not of a compiled or recorded step, whose parts cannot be told apart).
            fp8: Runs the products of all linear layers in the model's blocks in FP8, which changes results far more
                than bfloat16 does; see `fp8_products`. Enter `attached` around loops: a single call
                quantises the weights anew.

        Raises:
            SpecError: The compression is flat in its first stage, or does not fit a layer.
            UsageError: Another argument does not fit.
        """
        check_output(loss, "loss", "lower is better")
        if dtype not in (torch.float32, torch.float64):
            raise UsageError(f"gradients are given in torch.float32 or torch.float64, not {dtype}")
        check_seed(seed)
        self.spec = CompressionSpec.parse(sparsification=sparsification, projection=projection)
        first = self.spec.sparsification
        if not (first.is_identity or first.is_factored):
            raise SpecError(
                f"sparsification {first} is flat; expected a factored one such as {first.family}-{first.k}*{first.k}, "
                "or identity"
            )
        self.model, self.loss, self.dtype = model, loss, dtype
        self.device = device_of_model(model, device)
        shapes = find_layers(model, layers, include_head=include_head)
        for doubt in doubts(model, shapes, layers):
            logger.warning("%s", doubt)
        head = output_layer(model)
        self.include_head = head is not None and head in shapes
        if fp8 and (compile is True or graph):
            raise UsageError(
                "fp8 products are for compile=False or 'blocks' without graph=True: weights move meanwhile"
            )
        self.fp8, products = fp8, check_fp8(model) if fp8 else []
        modules = dict(model.named_modules())
        self._captures: dict[str, LayerCapture] = {}
        self._stage2s: dict[str, Projector | None] = {}
        maps = LayerMaps(
            self.spec, seed=seed, device=self.device, dtype=dtype, masks=masks, matrices=matrices, backend=backend
        )
        for name, shape in shapes.items():
            out, into = maps.side(name, "output", shape), maps.side(name, "input", shape)
            weight: Any = modules[name].weight
            self._captures[name] = LayerCapture(name, shape, out, into, weight.dtype)
            self._stage2s[name] = maps.stage2(name, self._captures[name].size)
        maps.check_all_used()
        self.layers: dict[str, LayerShape] = shapes
        self.sizes = {
            name: capture.size if (second := self._stage2s[name]) is None else second.k
            for name, capture in self._captures.items()
        }
        self.k = sum(self.sizes.values())
        if doubt := longer(shapes, self.sizes):
            logger.warning("%s", doubt)
        self._graph = self.device.type == "cuda" and (compile is True if graph is None else graph)
        # The clock of a recorded step would be part of the recording.
        self._clock = StepClock(self.device, stage1=timed and not (compile or self._graph))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._pass = CapturePass(
            model,
            self._captures,
            compile=compile,
            head=head if self.include_head else None,
            meter=self._clock.stage1,
            dtype=wide,
            fp8=products,
        )
        # Blocks defer their contractions as a recorded step does; how the batch uses the layers is seen at the first.
        self._defers = compile == "blocks"
        self._uses: tuple[object, Sides] | None = None
        self._together = Together(self._captures, self._stage2s)
        self._recorded: RecordedStep | None = None
        self._compiled_size: int | None = None
        self._noted = False

    @property
    def compiled_size(self) -> int | None:
        """Samples in a batch for which the compiled pass or the recorded step is used; other batches run as they are.

        As many as in the first batch where it is not set. Another size forgets what was recorded.
        """
        return self._compiled_size

    @compiled_size.setter
    def compiled_size(self, size: int) -> None:
        if size != self._compiled_size:
            self._recorded = self._uses = None
        self._compiled_size = size

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
        """Seconds since the last `restart_clocks`: ``gradients`` (forward, backward) and ``compression`` (both stages).

        The first batch, in which kernels are compiled and tables packed, counts like the later ones, by its samples.
        The parts of a compiled pass or a recorded step cannot be told apart; they count with the gradients.
        """
        return self._clock.timings

    def restart_clocks(self) -> None:
        """Lets `timings` begin anew, above all once everything is compiled."""
        self._clock.restart()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks the layers, freezes the weights and puts the model in evaluation mode, until the block is left.

        Calls attach by themselves; a loop of many calls, above all a compiled one, is faster inside one block. Blocks
        may be nested.
        """
        with self._pass.attached():
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
        if self._graph and regular:
            found = self._replay(samples, n)
            self._clock.count(n)
            return found
        if self._defers and regular:
            if self._uses is None or self._uses[0] == shapes_of(samples):
                return self._block_step(samples, n)
            regular = False
        with self._pass.attached(short=True):
            with measured(self._clock.total):
                captured = self._pass(output or self.loss, samples, n, compiled=regular)
            self._note_unused(captured)
            with measured(self._clock.stage2):
                rows = self._scaled({name: self._finish(name, captured, n) for name in self.sizes})
        self._clock.count(n)
        return rows, captured.values

    def _replay(self, samples: Batch, n: int) -> tuple[dict[str, Tensor], Tensor]:
        if self._recorded is None:
            with self._pass.attached(short=True):
                uses = self._pass.single_uses(self.loss, samples, n)
                self._recorded = RecordedStep(lambda inputs: self.deferred_step(inputs, n, uses), samples)
        elif not self._recorded.fits(samples):
            raise UsageError(
                f"a batch has {shapes_of(samples)}, and the recorded step was made for {self._recorded.shapes}; "
                "expected batches of one shape (or use graph=False)"
            )
        with measured(self._clock.total):
            return self._recorded(samples)

    def _block_step(self, samples: Batch, n: int) -> tuple[dict[str, Tensor], Tensor]:
        with self._pass.attached(short=True):
            if self._uses is None:
                self._uses = shapes_of(samples), self._pass.single_uses(self.loss, samples, n)
            with measured(self._clock.total):
                captured = self._pass(self.loss, samples, n, compiled=True, deferred=self._uses[1])
            with measured(self._clock.stage2):
                rows = self._joined(captured, n)
        self._clock.count(n)
        return rows, captured.values

    def deferred_step(self, samples: Batch, n: int, uses: Sides) -> tuple[dict[str, Tensor], Tensor]:
        """The step as it is recorded: contractions and stage 2 come after the backward pass, many layers at once.

        Args:
            samples: The batch, on the device.
            n: Its size.
            uses: Layers whose contraction is deferred.

        Returns:
            As a call does.
        """
        captured = self._pass(self.loss, samples, n, compiled=True, deferred=uses)
        check_columns()
        return self._joined(captured, n), captured.values

    def _joined(self, captured: Captured, n: int) -> dict[str, Tensor]:
        """Contraction and stage 2 of all layers, many at once where the kernel can."""
        self._note_unused(captured)
        found = captured.gradients
        sides = {name: (left, captured.inputs[name]) for name in captured.inputs if (left := found[name]) is not None}
        done = self._together(sides) if self.dtype == torch.float32 else {}
        left = {name: pair for name, pair in sides.items() if name not in done}
        products = self._together.products(left) if self.device.type == "cuda" else {}
        others = self._scaled(
            {name: self._finish(name, captured, n, products.get(name)) for name in self.sizes if name not in done}
        )
        return {name: done[name] if name in done else others[name] for name in self.sizes}

    def _note_unused(self, captured: Captured) -> None:
        """Says once which layers the first pass did not call."""
        if self._noted:
            return
        self._noted = True
        unused = [name for name, found in captured.gradients.items() if found is None]
        if unused:
            logger.warning(
                "layers that the pass did not call get rows of zeros: %s. A weight that is used while its layer is not "
                "called (as in torch.nn.MultiheadAttention) cannot be captured; leave such layers out of layers=",
                few(unused),
            )

    def _finish(self, name: str, captured: Captured, n: int, product: Tensor | None = None) -> Tensor:
        """What is left of the contraction, unless its product is given, and stage 2, of one layer."""
        found, second = captured.gradients[name], self._stage2s[name]
        if found is None:
            return torch.zeros(n, self.sizes[name], device=self.device, dtype=self.dtype)
        if product is not None:
            found = product
        elif name in captured.inputs:
            found = self._captures[name].join(found, captured.inputs[name])
        return (found if second is None else second(found)).to(self.dtype)

    def _scaled(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """The scales of masks, applied to all layers by one launch."""
        if not rows:
            return rows
        torch._foreach_mul_(list(rows.values()), [self._captures[name].scale for name in rows])  # pyright: ignore[reportPrivateImportUsage]
        return rows

"""Models made of equal blocks: one block is compiled, and the same code runs all of them.

A compiler that sees a whole model of dozens of blocks takes minutes; one block takes seconds. For the blocks to share
the code, nothing in it may depend on which block it runs: probes and tables are attributes of modules, which compilers
pass as arguments, and not entries of a dict by name as hooks have them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from grass_lib.errors import UsageError
from grass_lib.gradients.capture import LayerCapture
from grass_lib.gradients.compiling import compile_apart
from grass_lib.gradients.layers import first_input


class CapturedLayer(nn.Module):
    """Stands in for a layer while its gradients are captured.

    Attributes:
        inner: The layer.
        probe: Of the present pass; None where the layer runs as it is.
        deferred: Whether the pass leaves the contraction to the caller.
        kept: Compressed input of the present pass, where it is deferred.
    """

    def __init__(self, inner: nn.Module, capture: LayerCapture) -> None:
        """Keeps both.

        Args:
            inner: The layer.
            capture: Of it.
        """
        super().__init__()
        self.inner, self.capture = inner, capture
        self.probe: Tensor | None = None
        self.kept: Tensor | None = None
        self.deferred = False

    @property
    def weight(self) -> Any:
        """The layer's, for models that look at it."""
        return self.inner.weight

    @property
    def bias(self) -> Any:
        """The layer's, for models that look at it."""
        return self.inner.bias

    @property
    def in_features(self) -> Any:
        """The layer's, for models that look at it."""
        return self.inner.in_features

    @property
    def out_features(self) -> Any:
        """The layer's, for models that look at it."""
        return self.inner.out_features

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the layer and attaches the probe."""
        if self.probe is None:
            return self.inner(*args, **kwargs)
        kept = self.capture.keep(self.inner, first_input(args, kwargs), None)
        y = self.inner(*args, **kwargs)
        if self.deferred:
            if self.kept is not None:
                raise used_twice(self.capture.name)
            self.kept = kept[0]
            return self.capture.tap(y, self.probe)
        return self.capture.apply(kept, y, self.probe, None)


class CompiledBlocks:
    """The blocks of a model with the captured layers inside them.

    Attributes:
        names: Captured layers inside blocks.
    """

    def __init__(self, model: nn.Module, captures: Mapping[str, LayerCapture]) -> None:
        """Finds the blocks; the model is not touched.

        Args:
            model: The model.
            captures: By module name.

        Raises:
            UsageError: There is no list of two or more equal blocks.
        """
        path = find_blocks(model)
        modules = dict(model.named_modules())
        self._blocks: list[Any] = list(modules[path].children())
        self._places: list[tuple[nn.Module, str, str]] = []
        self._layers: dict[str, CapturedLayer] = {}
        known: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for parent, module in model.named_modules():
            for last, child in module._modules.items():
                known.setdefault(id(child), []).append((f"{parent}.", module, last))
        for name, capture in captures.items():
            places = known[id(modules[name])]  # a layer with several names has to be replaced at all of them
            inside = any(parent.startswith(f"{path}.") for parent, *_ in places)
            if inside and capture.shape.kind in ("linear", "conv1d"):
                self._layers[name] = CapturedLayer(modules[name], capture)
                self._places += [(module, last, name) for _, module, last in places]
        self.names = frozenset(self._layers)
        self._compiled: list[Any] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Puts the captured layers in their places and takes them out when the block is left, whatever happens."""
        with ExitStack() as stack:
            for parent, last, name in self._places:
                stack.callback(setattr, parent, last, self._layers[name].inner)
                self._layers[name].train(self._layers[name].inner.training)
                setattr(parent, last, self._layers[name])
            yield

    @contextmanager
    def probing(self, probes: Mapping[str, Tensor], deferred: Mapping[str, Any], *, compiled: bool) -> Iterator[None]:
        """Hands probes to the layers, and runs the blocks compiled, within one pass.

        Args:
            probes: By layer.
            deferred: Layers whose contraction is left to the caller.
            compiled: Whether the blocks run compiled.
        """
        if compiled and not self._compiled:
            run = compile_apart(_run)
            self._compiled = [functools.partial(run, block) for block in self._blocks]
        before = [block._compiled_call_impl for block in self._blocks]
        try:
            for name, layer in self._layers.items():
                layer.probe, layer.deferred = probes.get(name), name in deferred
            if compiled:
                for block, run in zip(self._blocks, self._compiled, strict=True):
                    block._compiled_call_impl = run
            yield
        finally:
            for block, run in zip(self._blocks, before, strict=True):
                block._compiled_call_impl = run
            for layer in self._layers.values():
                layer.probe = layer.kept = None

    def kept(self) -> dict[str, Tensor]:
        """Compressed inputs of the deferred layers that the pass used."""
        return {name: layer.kept for name, layer in self._layers.items() if layer.kept is not None}


def used_twice(name: str) -> UsageError:
    """What is raised where the contraction of a layer was left to the end of a pass that then calls it again.

    Args:
        name: Of the layer.
    """
    return UsageError(
        f"the layer {name} is called more than once in this pass, and was called once with the first batch; a model "
        "whose data decide how often it calls a layer needs compile=False"
    )


def _run(block: Any, *args: Any, **kwargs: Any) -> Any:
    return block._call_impl(*args, **kwargs)


def find_blocks(model: nn.Module, wanted_by: str = "compile='blocks'") -> str:
    """Name of the list of blocks that holds most of a model's weights.

    Args:
        model: The model.
        wanted_by: How the message calls what needs them.

    Raises:
        UsageError: There is no list of two or more modules of one class.
    """
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(block) for block in module}) == 1:
            found[name] = sum(parameter.numel() for parameter in module.parameters())
    if not found:
        raise UsageError(
            f"{wanted_by} needs a model with a list of equal blocks, and the {type(model).__name__} has none; "
            + ("use compile=True" if "compile" in wanted_by else "name the layers, or do without")
        )
    return max(found, key=lambda name: found[name])

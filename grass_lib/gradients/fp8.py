"""Matrix products of frozen linear layers in FP8: twice the arithmetic of bfloat16 on GPUs that have it.

Every row of an input and of an output's gradient (a token), and every row of a weight, is divided by a scale of its own
so that its largest entry is the largest number of the type e4m3, rounded to that type, and multiplied; a GPU's fast
sums keep about 14 bits, a CPU's are in float32. A token's scale does not depend on other tokens: per-sample gradients
stay independent of batch mates. The products forward and backward run over different sides of a weight, which is
therefore held twice, once in each layout: as many bytes as in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grass_lib.errors import UsageError
from grass_lib.gradients.blocks import find_blocks
from grass_lib.ranks import is_distributed

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
"""448: what the largest entry of a row becomes."""
MULTIPLE = 16
"""Sides of a weight are multiples of it, as the hardware's products need them."""
_CAPABILITY = (8, 9)  # the first GPUs of NVIDIA with FP8 products
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TINY = 1e-30  # rows that are smaller, or zero, become zero
_BUFFERS = ("fp8_rows", "fp8_row_scales", "fp8_columns", "fp8_column_scales")


class FP8Linear(nn.Linear):
    """A linear layer while its products run in FP8.

    A layer becomes one by its class and is the same object: hooks, and whoever keeps it, see nothing of it, and a
    compiler meets its tables as attributes of a module, so that equal blocks share code.
    """

    fp8_rows: Tensor
    fp8_row_scales: Tensor
    fp8_columns: Tensor
    fp8_column_scales: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """``(..., d_in)`` to ``(..., d_out)``, in the type of the input."""
        flat = input.reshape(-1, self.in_features)
        y = _Product.apply(flat, self.fp8_rows, self.fp8_row_scales, self.fp8_columns, self.fp8_column_scales)
        y = y.view(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """``x @ weight.T`` whose backward pass gives ``gradient @ weight``, both in FP8."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, row_scales: Tensor, columns: Tensor, column_scales: Tensor
    ) -> Tensor:
        ctx.save_for_backward(columns, column_scales)
        return product(x, rows, row_scales)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        columns, scales = ctx.saved_tensors
        return product(gradients[0], columns, scales), None, None, None, None


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in FP8, row by row.

    Args:
        x: ``(m, k)``.

    Returns:
        ``(m, k)`` in e4m3, contiguous, and the scales ``(m, 1)`` in float32 that it is to be multiplied with.
    """
    # By the reciprocal: PyTorch divides by a number so on GPUs, not on CPUs, and a last bit decides half-way cases.
    scales = x.abs().amax(dim=1, keepdim=True).float().clamp_min(_TINY) * (1.0 / LARGEST)
    values = (x.float() / scales).clamp(-LARGEST, LARGEST).to(FLOAT8)
    return values.contiguous(), scales


def product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """``x @ weight.T`` in FP8.

    Args:
        x: ``(m, k)``; its rows are quantised here.
        weight: ``(n, k)`` in e4m3, contiguous.
        scales: ``(1, n)`` in float32, of the weight's rows.

    Returns:
        ``(m, n)``, rounded to bfloat16, in the type of ``x``.
    """
    values, own = quantised(x)
    # Row-wise scales come with results in bfloat16; fast sums are the only fast kernels that such scales have.
    multiply: Any = _multiplied if x.is_cpu else torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    found = multiply(values, weight.t(), own, scales, out_dtype=torch.bfloat16, use_fast_accum=True)
    # Not found.to(...) always: to its own type that is the same tensor under a second name, and where PyTorch 2.11
    # compiles an autograd function, an output with two names gets zeros for its gradient (pytorch/pytorch#180642).
    return found if found.dtype == x.dtype else found.to(x.dtype)


def _multiplied(
    left: Tensor, right: Tensor, left_scales: Tensor, right_scales: Tensor, *, out_dtype: torch.dtype, **_: bool
) -> Tensor:
    """What ``torch._scaled_mm`` computes, for CPUs: the same roundings, exact products, sums in float32."""
    return (left.float() @ right.float() * left_scales * right_scales).to(out_dtype)


def device_problem(device: torch.device) -> str:
    """Why FP8 products do not run on a device; empty where they do. A CPU computes their numbers, slowly."""
    if device.type == "cpu":
        return ""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"fp8 products need a GPU of NVIDIA (or a CPU, slowly), and the device is {device}; use fp8=False"
    found = torch.cuda.get_device_capability(device)
    if found < _CAPABILITY:
        return (
            f"fp8 products need a GPU of compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]} or more, and "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; use fp8=False"
        )
    return ""


def block_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers in a model's blocks.

    Raises:
        UsageError: The model has no list of equal blocks, or no linear layer there.
    """
    path = find_blocks(model, "fp8=True")
    found = [name for name, module in model.named_modules() if name.startswith(f"{path}.") and _is_linear(module)]
    if not found:
        raise UsageError(f"the blocks of the {type(model).__name__} have no linear layer; use fp8=False")
    return found


def check_fp8(model: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """The layers whose products can run in FP8, checked.

    Args:
        model: The model, on its device.
        names: Of linear layers; None for those of the model's blocks.

    Returns:
        Their names.

    Raises:
        UsageError: The device has no such products, or a layer is not one that can; it is named.
    """
    chosen, modules = block_linears(model) if names is None else list(names), dict(model.named_modules())
    for name in chosen:
        module = modules.get(name)
        if module is None or not _is_linear(module):
            kind = "not there" if module is None else f"a {type(module).__name__}"
            raise UsageError(f"layer '{name}' is {kind}; fp8 products are for layers of the class torch.nn.Linear")
        weight: Any = module.weight
        problem = device_problem(weight.device)
        if is_distributed(weight):
            problem = "its weight is sharded over ranks"
        elif any(side % MULTIPLE for side in weight.shape):
            problem = f"its weight has the shape {tuple(weight.shape)}; expected multiples of {MULTIPLE}"
        elif weight.dtype not in _DTYPES:
            problem = f"its weight is of {weight.dtype}; expected bfloat16, float16 or float32"
        if problem:
            raise UsageError(f"layer '{name}' cannot have fp8 products: {problem}")
    return chosen


@contextmanager
def fp8_products(model: nn.Module, names: Iterable[str] | None = None, *, keep_weights: bool = False) -> Iterator[None]:
    """Runs the products of frozen linear layers in FP8, forward and backward, until the block is left.

    The layers' weights cannot be read meanwhile: they are NaN, without memory. On a GPU they wait in the host's memory,
    so that those in FP8 take their place; afterwards they are back, bit for bit, also after an exception.

    Args:
        model: The model, on its device.
        names: Of linear layers; None for those of the model's blocks.
        keep_weights: Leaves the weights on the GPU: entering and leaving takes no copies, and twice the memory is held.

    Raises:
        UsageError: A layer cannot have FP8 products, or its weights require gradients.
    """
    chosen, modules = check_fp8(model, names), dict(model.named_modules())
    layers = [modules[name] for name in chosen]
    for name, layer in zip(chosen, layers, strict=True):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            raise UsageError(
                f"layer '{name}' is trainable, and fp8 products are for frozen ones; requires_grad_(False)"
            )
    shared = _used_elsewhere(model, layers)
    with ExitStack() as stack:
        tables: dict[int, tuple[Tensor, ...]] = {}
        for layer in layers:
            weight: Any = layer.weight
            if id(weight) not in tables:
                tables[id(weight)] = _tables(weight.detach())
                if id(weight) not in shared:
                    _set_aside(weight, stack, move=weight.is_cuda and not keep_weights)
            stack.callback(_restore, layer)
            for name, table in zip(_BUFFERS, tables[id(weight)], strict=True):
                layer.register_buffer(name, table, persistent=False)
            layer.__class__ = FP8Linear
        tables.clear()
        yield


def _is_linear(module: nn.Module) -> bool:
    # A subclass may do something else with its weight.
    return type(module) is nn.Linear


def _tables(weight: Tensor) -> tuple[Tensor, ...]:
    """A weight ``(n, k)`` as the products forward and backward take it: quantised by row, and by column."""
    rows, row_scales = quantised(weight)
    columns, column_scales = quantised(weight.t())
    return rows, row_scales.view(1, -1), columns, column_scales.view(1, -1)


def _set_aside(weight: Any, stack: ExitStack, *, move: bool) -> None:
    """Takes a weight's memory away until the stack is left."""
    kept, device = weight.data, weight.device
    if move:
        kept = kept.to("cpu")

    def back() -> None:
        weight.data = kept.to(device)

    stack.callback(back)
    weight.data = torch.full((1, 1), float("nan"), dtype=weight.dtype, device=device).expand(weight.shape)


def _restore(layer: nn.Module) -> None:
    layer.__class__ = nn.Linear
    for name in _BUFFERS:
        layer._buffers.pop(name, None)
        layer._non_persistent_buffers_set.discard(name)


def _used_elsewhere(model: nn.Module, layers: list[nn.Module]) -> set[int]:
    """Weights that other modules use as well, or that share their memory: they stay."""
    own = {id(layer) for layer in layers}
    found = {id(value) for module in model.modules() if id(module) not in own for value in module._parameters.values()}
    for layer in layers:
        weight: Any = layer.weight
        if weight.untyped_storage().nbytes() != weight.nbytes:
            found.add(id(weight))
    return found

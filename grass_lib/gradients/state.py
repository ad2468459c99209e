"""The weights of one checkpoint, laid out for a functional call, and the model kept as it was found."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from grass_lib.errors import UsageError

Checkpoint: TypeAlias = Mapping[str, Tensor] | str | Path
ParameterFilter: TypeAlias = Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class ModelState:
    """The tensors of one checkpoint on one device.

    Attributes:
        trainable: Parameters that are differentiated, in ``named_parameters()`` order.
        fixed: Parameters that are not.
        buffers: Buffers, cloned before every call so that a model cannot change them.
    """

    trainable: dict[str, Tensor]
    fixed: dict[str, Tensor]
    buffers: dict[str, Tensor]


def copy_onto(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies tensors onto others of the same shapes, on a GPU with few launches.

    Args:
        targets: Are written to.
        sources: One for each.
    """
    by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        mine, given = by_type.setdefault(target.dtype, ([], []))
        mine.append(target)
        given.append(source)
    with torch.no_grad():
        for mine, given in by_type.values():
            torch._foreach_copy_(mine, given)  # pyright: ignore[reportPrivateImportUsage]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every submodule in evaluation mode and gives each its own mode back, also after an exception.

    The flags are set directly: ``train()`` and ``eval()`` may be overridden with side effects (merging adapters, say).
    Models of transformers collect no keys and values for generation meanwhile (``config.use_cache``): they would take
    memory, and a compiler would see another cache in every block.
    """
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(config): config for module, _ in modes if (config := getattr(module, "config", None)) is not None}
    caching: list[Any] = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    try:
        for module, _ in modes:
            module.training = False
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for config in caching:
            config.use_cache = True


def trainable_names(model: nn.Module, parameters: ParameterFilter | None = None) -> list[str]:
    """Names of the parameters that require gradients and pass the filter; tied weights appear once.

    Raises:
        UsageError: If nothing is left to differentiate.
    """
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameters is None or parameters(name, parameter))
    ]
    if not names:
        total = sum(1 for _ in model.named_parameters())
        raise UsageError(
            f"The model has {total} parameter tensors and none of them is left to differentiate: "
            "set requires_grad on the weights that count, or widen `parameters`."
        )
    return names


def bind_state(
    model: nn.Module, names: list[str], device: torch.device, state: Mapping[str, Tensor] | None = None
) -> ModelState:
    """Lays the weights of a checkpoint (or the model's own) out on a device; the model itself is not touched.

    Args:
        model: Gives names, shapes and dtypes, and every tensor that the checkpoint does not hold (non-persistent
            buffers).
        names: The parameters to differentiate.
        device: Where the computation runs.
        state: A state dict of this model; None for the model's present weights.

    Raises:
        UsageError: If the checkpoint does not fit the model.
    """
    if state is not None:
        check_fit(model, {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)})
    values: Mapping[str, Tensor] = {} if state is None else _fill_tied(model, state)
    chosen = set(names)

    def place(name: str, own: Tensor) -> Tensor:
        # Copied even where nothing changes: a mapped file or a slice of stacked weights lies unaligned in memory, and
        # the last bits of a product depend on the alignment.
        value = values.get(name, own).detach()
        return value.to(device=device, dtype=own.dtype, copy=True, memory_format=torch.contiguous_format)

    parameters = {name: place(name, own) for name, own in model.named_parameters()}
    return ModelState(
        trainable={name: parameters[name] for name in names},
        fixed={name: value for name, value in parameters.items() if name not in chosen},
        buffers={name: place(name, own) for name, own in model.named_buffers()},
    )


def check_fit(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str = "The checkpoint") -> None:
    """Compares names and shapes of a checkpoint with a model.

    Args:
        model: The model.
        shapes: Shape by name, as found in the checkpoint.
        source: How error messages call the checkpoint.

    Raises:
        UsageError: Naming what is missing, what is too much and what has another shape.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    aliases = _aliases(model)
    missing = [name for name in expected if name not in shapes and not aliases.get(name, set()) & shapes.keys()]
    extra = [name for name in shapes if name not in expected]
    if missing or extra:
        raise UsageError(
            f"{source} does not fit the model: missing {_listing(missing)}; not in the model {_listing(extra)}. "
            "Save it with model.state_dict() of the same class."
        )
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise UsageError(f"{source} does not fit the model: '{name}' has shape {shape}, expected {expected[name]}.")


def checkpoint_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes by name; of a file only the header is read.

    Raises:
        UsageError: If a path is no readable safetensors file.
    """
    if isinstance(checkpoint, Mapping):
        return {name: tuple(value.shape) for name, value in checkpoint.items() if isinstance(value, Tensor)}
    with _opened(checkpoint) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict


def load_checkpoint(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """The state dict itself, or the one in a safetensors file (on the CPU).

    Raises:
        UsageError: If a path is no readable safetensors file.
    """
    if isinstance(checkpoint, Mapping):
        return checkpoint
    with _opened(checkpoint) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


@contextmanager
def _opened(path: str | Path) -> Iterator[safe_open]:
    try:
        with safe_open(Path(path), framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"Checkpoint '{path}' cannot be read as safetensors ({error}). "
            "Pass a state dict or a file written by safetensors.torch.save_file."
        ) from error


def _aliases(model: nn.Module) -> dict[str, set[str]]:
    """Other names of the same tensor, for tied weights."""
    by_tensor: dict[int, set[str]] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, value in tensors:
        by_tensor.setdefault(id(value), set()).add(name)
    return {name: by_tensor[id(value)] - {name} for name, value in tensors}


def _fill_tied(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives a tied weight its value under the name that the model lists first, whichever name the checkpoint holds."""
    values = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for name, others in _aliases(model).items():
        present = [other for other in others if other in state]
        if name not in state and present:
            values[name] = state[present[0]]
        elif name in state and any(not torch.equal(state[name], state[other]) for other in present):
            raise UsageError(
                f"The checkpoint holds different values for the tied weights '{name}' and {_listing(present)}; "
                "expected one value. Build the model without tying, or save the checkpoint from the tied model."
            )
    return values


def _listing(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in sorted(names)[:5])
    return f"[{shown}{', ...' if len(names) > 5 else ''}]"

"""Which layers of a model are captured, and what their gradients look like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from grass_lib.errors import UsageError
from grass_lib.words import few

LayerFilter: TypeAlias = Callable[[str, nn.Module], bool]
LayerChoice: TypeAlias = str | Sequence[str] | LayerFilter

KINDS = ("linear", "conv1d", "conv2d", "embedding", "layernorm", "rmsnorm")
"""Kinds of layers; ``conv1d`` is the transposed linear layer of GPT-2 in transformers."""
GROUPS = {"linear": ("linear", "conv1d"), "norm": ("layernorm", "rmsnorm"), "all": KINDS}
"""Words for several kinds at once."""
_WORDS = ", ".join(dict.fromkeys((*KINDS, *GROUPS)))


@dataclass(frozen=True)
class LayerShape:
    """A layer whose per-sample gradient is a matrix, output side first.

    Attributes:
        kind: One of `KINDS`.
        d_out: Output side: output features or channels; features of a norm.
        d_in: Input side with the bias as its last column; vocabulary of an embedding; weight and bias of a norm.
        bias: Whether there is a bias column.
    """

    kind: str
    d_out: int
    d_in: int
    bias: bool


def find_layers(model: nn.Module, layers: LayerChoice, *, include_head: bool = False) -> dict[str, LayerShape]:
    """The chosen layers by module name, in the order of the model.

    Args:
        model: The model.
        layers: A kind of `KINDS`, a word of `GROUPS`, a pattern of module names (``"transformer.h.*.mlp.*"``), a list
            of these, or ``layers(name, module) -> bool``. A pattern or function that meets a container takes nothing
            from it.
        include_head: Whether kinds take the output layer (`output_layer`) too; patterns and functions decide
            themselves. Of a weight that two layers share, each has the gradient that flows through itself.

    Raises:
        UsageError: Nothing is chosen, or a layer with weights is chosen that is not supported; it is named.
    """
    head = None if include_head else output_layer(model)
    kinds, patterns, chosen_by = _parse(layers)
    idle = set(patterns)
    found: dict[str, LayerShape] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        weights = next(module.parameters(recurse=False), None) is not None or is_parametrized(module)
        if id(module) in seen or not weights or isinstance(module, ParametrizationList):
            continue
        seen.add(id(module))
        shape, problem = describe(module)
        by_name = chosen_by(name, module) if chosen_by else _matches(name, patterns, idle)
        by_kind = shape is not None and shape.kind in kinds and name != head
        if not (by_name or by_kind):
            continue
        if shape is None or problem:
            raise refused(name, module, problem)
        found[name] = shape
    if found and idle:
        raise UsageError(
            f"layers has {', '.join(map(repr, sorted(idle)))}, which no layer of the {type(model).__name__} with "
            f"weights of its own is called; expected one of {_WORDS}, or a pattern of module names"
        )
    if not found:
        raise UsageError(
            f"layers={layers!r} chooses no layer of the {type(model).__name__}; expected one of "
            f"{_WORDS}, a pattern of module names, a list of these or a function"
        )
    return found


def refused(name: str, module: nn.Module, problem: str) -> UsageError:
    """The error of a layer that cannot be captured, for whoever raises it."""
    return UsageError(
        f"layer '{name}' ({type(module).__name__}) cannot be captured: {problem}; leave it out of layers="
    )


def not_samples(name: str, shape: Sequence[int], n: int) -> UsageError:
    """The error of a layer whose output has something else than ``n`` samples on dimension 0."""
    return UsageError(
        f"layer '{name}' gives an output of shape {tuple(shape)} in a batch of {n} sample{'' if n == 1 else 's'}; "
        "expected samples on dimension 0. Leave it out of layers="
    )


def first_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A layer's input, whether it is given by its place or by its name."""
    return args[0] if args else next(iter(kwargs.values()))


def doubts(model: nn.Module, found: Iterable[str], layers: LayerChoice) -> list[str]:
    """What a user may not expect of a choice of layers, a sentence each.

    Args:
        model: The model.
        found: Names of the chosen layers.
        layers: The choice.
    """
    modules, chosen = dict(model.named_modules()), set(found)
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for value in module.parameters(recurse=False):
            owners.setdefault(id(value), []).append(name)
    shared = [names for names in owners.values() if len(names) > 1 and chosen & set(names)]
    said = [
        f"{' and '.join(names)} share a weight; the rows of a layer hold what flows through that layer alone, not the "
        "gradient of the whole weight"
        for names in shared
    ]
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    derived = [name for name in found if is_parametrized(modules[name])]
    own = {id(getattr(modules[name], key, None)) for name in chosen for key in ("weight", "bias")}
    head = output_layer(model)
    left = [
        name
        for name, value in trained.items()
        if id(value) not in own
        and (parent := name.rpartition(".")[0]) != head
        and (parent in chosen or layers == "all")
        and not any(name.startswith(f"{one}.parametrizations.") for one in derived)
    ]
    frozen = [name for name in found if name not in derived and not modules[name].weight.requires_grad]
    if left:
        whose = (
            "layers='all' leaves out weights of other kinds" if layers == "all" else "captured layers have more weights"
        )
        said.append(f"{whose}: {few(left)}")
    if frozen and trained:
        said.append(f"layers whose weights are frozen are captured like the others: {few(frozen)}")
    if derived:
        said.append(f"rows of layers with parametrized weights are of the weights they result in: {few(derived)}")
    return said


def longer(shapes: Mapping[str, LayerShape], sizes: Mapping[str, int]) -> str:
    """A sentence on layers whose compressed gradients are longer than their own; empty where there are none.

    Args:
        shapes: Of the layers.
        sizes: Their compressed sizes.
    """
    found = [
        f"{name} ({weights:,} weights, {sizes[name]:,} features)"
        for name, shape in shapes.items()
        if sizes[name] > (weights := shape.d_out * shape.d_in)
    ]
    if not found:
        return ""
    return (
        f"the compression makes gradients of layers longer than they are: {few(found)}; a smaller one costs less, and "
        "identity keeps everything"
    )


def output_layer(model: nn.Module) -> str | None:
    """Name of the layer that gives a language model's logits: transformers' output embeddings, or ``lm_head``."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    for name, module in model.named_modules():
        if (head is not None and module is head) or (head is None and name.rpartition(".")[2] == "lm_head"):
            return name
    return None


def describe(module: Any) -> tuple[LayerShape | None, str]:
    """Shape of a layer that has weights of its own, and why it cannot be captured, empty where it can."""
    if isinstance(module, nn.Linear):
        bias = module.bias is not None
        return LayerShape("linear", module.out_features, module.in_features + bias, bias), ""
    if (
        type(module).__name__.removeprefix("Parametrized") == "Conv1D"
        and hasattr(module, "nf")
        and module.weight.dim() == 2
    ):
        d_in, d_out = module.weight.shape
        bias = getattr(module, "bias", None) is not None
        return LayerShape("conv1d", d_out, d_in + bias, bias), ""
    if isinstance(module, nn.Conv2d):
        bias = module.bias is not None
        d_in = module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
        problem = f"it has {module.groups} groups, and only 1 is supported" if module.groups != 1 else ""
        return LayerShape("conv2d", module.out_channels, d_in + bias, bias), problem
    if isinstance(module, nn.Embedding):
        odd = [name for name in ("max_norm", "scale_grad_by_freq") if getattr(module, name)]
        problem = f"its option {odd[0]} makes gradients depend on the batch" if odd else ""
        return LayerShape("embedding", module.embedding_dim, module.num_embeddings, False), problem
    if isinstance(module, nn.LayerNorm):
        problem = "it normalises several dimensions" if len(module.normalized_shape) != 1 else ""
        bias = module.bias is not None
        return LayerShape("layernorm", module.normalized_shape[-1], 1 + bias, bias), problem
    if type(module).__name__.endswith("RMSNorm") and getattr(module, "weight", None) is not None:
        problem = "it normalises several dimensions" if module.weight.dim() != 1 else ""
        return LayerShape("rmsnorm", module.weight.shape[-1], 1, False), problem
    return None, f"supported are {', '.join(KINDS)}"


def _matches(name: str, patterns: Sequence[str], idle: set[str]) -> bool:
    matching = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
    idle.difference_update(matching)
    return bool(matching)


def _parse(layers: LayerChoice) -> tuple[set[str], list[str], LayerFilter | None]:
    if isinstance(layers, type):
        raise UsageError(
            f"layers is the class {layers.__name__}; expected one of {_WORDS}, a pattern of module names, a list of "
            f"these, or a function such as lambda name, module: isinstance(module, {layers.__name__})"
        )
    if not isinstance(layers, str) and callable(layers):
        return set(), [], layers
    if not isinstance(layers, Iterable):
        raise UsageError(f"layers is {layers!r}; expected one of {_WORDS}, a pattern, a list of these or a function")
    words: Iterable[str] = [layers] if isinstance(layers, str) else layers
    kinds: set[str] = set()
    patterns: list[str] = []
    for word in words:
        if not isinstance(word, str):
            raise UsageError(f"layers has the entry {word!r}; expected kinds or patterns of module names")
        if word in GROUPS:
            kinds.update(GROUPS[word])
        elif word in KINDS:
            kinds.add(word)
        else:
            patterns.append(word)
    return kinds, patterns, None

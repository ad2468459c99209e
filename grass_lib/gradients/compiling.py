"""Functions compiled apart from each other."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, cast

import torch


def compile_apart(function: Callable[..., Any], *, dynamic: bool = False) -> Callable[..., Any]:
    """Compiles a copy of a function that has a code object of its own.

    PyTorch counts compilations by code object and runs what goes beyond ``torch._dynamo.config.recompile_limit`` as it
    is, with a warning: the ninth compression that a process compares would be slow.

    Args:
        function: A function of Python, not a method.
        dynamic: One code for all sizes; otherwise each has its own.
    """
    found = cast("types.FunctionType", function)
    own = types.FunctionType(
        found.__code__.replace(), found.__globals__, found.__name__, found.__defaults__, found.__closure__
    )
    own.__kwdefaults__ = found.__kwdefaults__
    return torch.compile(own, dynamic=dynamic)

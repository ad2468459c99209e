"""Attention masks of transformers under ``torch.func.vmap``, where no value may decide what is computed."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Their masks may be left out where nothing is masked, which is a question about values.
_SKIPPING = ("sdpa", "eager")
_SKIPS = {"allow_is_causal_skip", "allow_is_bidirectional_skip"}
_lock, _open = threading.Lock(), {"blocks": 0}
_before: dict[str, Any] = {}


@contextmanager
def whole_masks() -> Iterator[None]:
    """Lets transformers build the mask of every batch that has one, whatever its values.

    Ordinarily its models look whether an ``attention_mask`` masks anything, and leave it out where it does not. Within
    the block they do not look: attention gives the same numbers to rounding. Batches without a mask are served as ever.
    Where transformers is not loaded, nothing is done.
    """
    registry = getattr(sys.modules.get("transformers.masking_utils"), "ALL_MASK_ATTENTION_FUNCTIONS", None)
    if registry is None:
        yield
        return
    _change(registry, +1)
    try:
        yield
    finally:
        _change(registry, -1)


def _change(registry: Any, by: int) -> None:
    """Counts the blocks that are open, in all threads: the first one changes the registry, the last one mends it."""
    with _lock:
        _open["blocks"] += by
        if by > 0 and _open["blocks"] == 1:
            _before.update({name: registry[name] for name in _SKIPPING if name in registry})
            for name, function in _before.items():
                registry[name] = _never_skipping(function)
        elif by < 0 and _open["blocks"] == 0:
            for name, function in _before.items():
                del registry[name]
                if registry.get(name) is not function:
                    registry[name] = function
            _before.clear()


def _never_skipping(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def build(*args: Any, **options: Any) -> Any:
        if options.get("attention_mask") is not None:
            options |= dict.fromkeys(_SKIPS & options.keys(), False)
        return function(*args, **options)

    return build

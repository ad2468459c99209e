"""Which gradients an attributor computes: all coordinates, or only those that its masks keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from grass_lib.errors import UsageError
from grass_lib.gradients.full import PerSampleGradients
from grass_lib.gradients.masked import MaskedGradients
from grass_lib.projection import Projector
from grass_lib.projection.restricted import RestrictedProjector, leading_mask
from grass_lib.specs import CompressionSpec

GradientChoice = Literal["auto", "full", "masked"]
CHOICES: tuple[GradientChoice, ...] = ("auto", "full", "masked")
# "auto" forms whole gradients of layers that are not known by kind only for up to one weight in so many.
_GENERAL_SHARE = 20


class GradientRoute:
    """The choice, made once from the first checkpoint's projectors.

    Attributes:
        kind: "full" or "masked".
    """

    def __init__(
        self, full: PerSampleGradients, choice: GradientChoice, projectors: Mapping[str, Projector], backend: str
    ) -> None:
        """Chooses.

        Args:
            full: Gradients of all coordinates.
            choice: "full", "masked", or "auto": masked where every projector begins with a mask and the model's layers
                are known by kind, but for a twentieth of its weights.
            projectors: By spec.
            backend: As in ``build_projector``; "kernel" computes masked gradients by the kernel too.

        Raises:
            UsageError: The choice is none of the three, or "masked" and a projector begins with something else.
        """
        if choice not in CHOICES:
            raise UsageError(f"gradients is {choice!r}; expected one of {', '.join(CHOICES)}.")
        self._full, self._masked = full, None
        others = [name for name, projector in projectors.items() if leading_mask(projector) is None]
        if choice == "masked" and others:
            raise UsageError(
                f"gradients='masked' needs specs that begin with a mask, and {', '.join(others)} does not; expected "
                "random_mask, selective_mask, grass or selective_grass first. Use gradients='auto', or separate passes."
            )
        if choice == "full" or others:
            self.kind = "full"
            self._reason = "asked for" if choice == "full" else f"{', '.join(others)} begins with no mask"
            return
        masked = MaskedGradients(
            full.model,
            full.output,
            _union(projectors),
            micro_batch=full.micro_batch,
            parameters=full.parameters,
            device=full.device,
            dtype=full.dtype,
            backend="kernel" if backend == "kernel" else "torch",
        )
        if choice == "auto" and masked.general_weights * _GENERAL_SHARE > full.p:
            self.kind = "full"
            self._reason = f"{masked.general_weights} of {full.p} weights belong to layers that are not known by kind"
            return
        self.kind, self._masked = "masked", masked
        self._reason = "asked for" if choice == "masked" else "every spec begins with a mask"

    @property
    def model_calls(self) -> int:
        """How often the model has been run so far."""
        return self._full.model_calls + (0 if self._masked is None else self._masked.model_calls)

    @property
    def reason(self) -> str:
        """Why, and of how many weights whole gradients are formed as far as is known by now."""
        general = 0 if self._masked is None else self._masked.general_weights
        return self._reason + (f"; whole gradients are formed for {general} weights" if general else "")

    def prepared(
        self, projectors: Mapping[str, Projector]
    ) -> tuple[PerSampleGradients | MaskedGradients, dict[str, Projector]]:
        """The gradients for one checkpoint and the projectors that take their rows.

        Args:
            projectors: Of that checkpoint, by spec.
        """
        if self._masked is None:
            return self._full, dict(projectors)
        masked = self._masked.keeping(_union(projectors))
        return masked, {name: RestrictedProjector(one, masked.indices) for name, one in projectors.items()}


def refuse_unused_masks(specs: Sequence[CompressionSpec], masks: Any) -> None:
    """Refuses masks that no spec would look at.

    Args:
        specs: The compressions.
        masks: A mask, a list with one for each checkpoint, a dict of these by spec string, or None.

    Raises:
        UsageError: No spec is of a selective type, or the dict has an entry for one that is not. Entries for specs
            that are not there are fine, so that one dict serves several calls.
    """
    by_spec = isinstance(masks, Mapping)
    if masks is None or (by_spec and not masks):
        return
    without = [str(spec) for spec in specs if not spec.needs_mask_file]
    refused = [name for name in without if name in masks] if by_spec else without if len(without) == len(specs) else []
    if refused:
        raise UsageError(
            f"masks are given, and {', '.join(map(repr, refused))} takes none; leave them out, or use a selective "
            "type, for example selective_mask-16384->sjlt-4096"
        )


def _union(projectors: Mapping[str, Projector]) -> torch.Tensor:
    """All coordinates that a mask keeps, ascending, on the CPU."""
    found = [leading_mask(projector) for projector in projectors.values()]
    return torch.cat([mask.indices.cpu() for mask, _ in filter(None, found)]).unique()

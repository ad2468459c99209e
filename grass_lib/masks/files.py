"""Masks of all layers in one file, and their check against the model that they are used with.

One file, because masks of a model are only of use together: it appears whole or not at all, and no folder can hold half
of one model's masks and half of another's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from grass_lib.errors import UsageError
from grass_lib.files import write_whole
from grass_lib.gradients.layers import LayerShape
from grass_lib.projection import Mask

FORMAT = "grass masks 1"
_SHOWN = 4


def save_masks(path: str | Path, masks: Mapping[str, Mask]) -> None:
    """Writes one safetensors file, whole or not at all.

    Args:
        path: The file; its folder must exist.
        masks: By side, ``LAYER/output`` and ``LAYER/input``.

    Raises:
        UsageError: The folder does not exist, or there are no masks.
        GrassError: The file could not be written; what was there before is untouched.
    """
    path = Path(path)
    if not masks:
        raise UsageError(f"there are no masks to write to {path.name!r}; expected at least one")
    if not path.parent.is_dir():
        raise UsageError(
            f"cannot write the masks {path.name!r}: the folder {path.parent} does not exist; make it first"
        )
    tensors, described = {}, {}
    for key, mask in masks.items():
        tensors[f"{key}/indices"] = mask.indices.cpu().contiguous()
        if mask.scores is not None:
            tensors[f"{key}/scores"] = mask.scores.cpu().contiguous()
        described[key] = {"p": mask.p, "fingerprint": mask.fingerprint, "provenance": dict(mask.provenance)}
    metadata = {"format": FORMAT, "masks": json.dumps(described)}
    write_whole(path, save(tensors, metadata), "mask file", then="save the masks again")


def load_masks(
    path: str | Path, *, expect: Mapping[str, str] | None = None, layers: Mapping[str, LayerShape] | None = None
) -> dict[str, Mask]:
    """Reads a file of `save_masks` and checks that its masks are the ones asked for.

    Args:
        path: The file.
        expect: Entries that the provenance of every mask must have with these values, such as the hash of the model's
            weights (``{"model": model_sha256(model)}``) or the spec; None checks nothing.
        layers: The layers that will be captured (`FactoredGradients.layers`): names and sizes must be the same.

    Returns:
        Masks by side, as ``FactoredGradients(masks=...)`` takes them.

    Raises:
        UsageError: The file is missing or damaged, or its masks are for another model, other data or other layers; the
            message shows what was expected and what was found.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"mask file {str(path)!r} does not exist; make one with `grass masks`, or correct the path")
    masks = _read(path)
    for key, mask in masks.items():
        for name, value in (expect or {}).items():
            found = mask.provenance.get(name)
            if found != value:
                seen = "no such entry" if found is None else found
                raise UsageError(
                    f"{path.name} holds masks of another {name}: expected {name} {value}, and the mask {key!r} has "
                    f"{seen}; make masks for this {name}, or take the file made for it"
                )
    if layers is not None:
        _check_layers(path.name, masks, layers)
    return masks


def _read(path: Path) -> dict[str, Mask]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path.name} is not a readable safetensors file ({error}); expected masks") from error
    if metadata.get("format") != FORMAT:
        seen = "a single mask, for Mask.load" if "fingerprint" in metadata else repr(metadata.get("format"))
        raise UsageError(f"{path.name} has the format {seen}; expected {FORMAT!r}, as save_masks writes it")
    masks: dict[str, Mask] = {}
    try:
        described: dict[str, Any] = json.loads(metadata["masks"])
        for key, entry in described.items():
            mask = Mask(tensors[f"{key}/indices"], entry["p"], tensors.get(f"{key}/scores"), entry["provenance"])
            masks[key] = mask
            if mask.fingerprint != entry["fingerprint"]:
                raise UsageError(
                    f"{path.name} is damaged or was edited: the indices of {key!r} have fingerprint "
                    f"{mask.fingerprint}, and the file says {entry['fingerprint']}; make the masks again"
                )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path.name} has unreadable metadata ({error!r}); make the masks again") from error
    return masks


def _check_layers(file: str, masks: Mapping[str, Mask], layers: Mapping[str, LayerShape]) -> None:
    sizes = {f"{name}/output": shape.d_out for name, shape in layers.items()}
    sizes |= {f"{name}/input": shape.d_in for name, shape in layers.items()}
    missing, extra = sorted(sizes.keys() - masks.keys()), sorted(masks.keys() - sizes.keys())
    if missing or extra:
        raise UsageError(
            f"{file} holds masks of other layers: expected those of {len(layers)} layers, of which it lacks "
            f"{_listing(missing)}; it has {_listing(extra)} besides; make masks for this model and choice of layers"
        )
    for key, d in sizes.items():
        if masks[key].p != d:
            raise UsageError(
                f"{file} holds masks of another model: expected {d} coordinates for {key!r}, and its mask was made for "
                f"{masks[key].p}; make masks for this model"
            )


def _listing(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "") or "none"

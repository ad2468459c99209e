"""Masks for ResNet-9 + CIFAR-2: the coordinates that its selective compressions keep."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from grass_lib.attribution.model_hash import model_sha256
from grass_lib.experiments.base import resolve_device
from grass_lib.experiments.data.cifar2 import Photos
from grass_lib.experiments.models.resnet9 import ResNet9
from grass_lib.experiments.resnet9_cifar2 import Protocol, batches, make_model
from grass_lib.gradients import PerSampleGradients, margin
from grass_lib.masks import GradientSource, fit
from grass_lib.masks.energy import second_moments
from grass_lib.masks.objective import top_k
from grass_lib.projection import Mask
from grass_lib.specs import CompressionSpec

_CACHE_BYTES = 16 * 2**30
"""Largest copy of gradients that learning holds: 9.7 GB for 1,000 images at the paper's sizes."""


def fit_masks(
    protocol: Protocol,
    specs: Sequence[CompressionSpec],
    checkpoints: Sequence[Mapping[str, Tensor]],
    data: Photos,
    folder: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, list[Mask]]:
    """Masks for the selective ones among some compressions, fitted here or read from an earlier run.

    ``energy`` fits a mask for every network in one walk over its gradients, whatever the number of sizes. ``learned``
    takes minutes for a mask of millions of coordinates, so the first network's is used for all, as in the paper.

    Args:
        protocol: Of the scale; its ``masks`` names the method.
        specs: Compressions; those that need no mask are passed over.
        checkpoints: State dicts of the networks.
        data: Training images.
        folder: Where masks are kept.
        seed: Of everything random in learning.
        device: Where to compute.
        progress: Shows a bar when learning lasts.

    Returns:
        One mask per checkpoint, by spec: what ``TRAK(masks=...)`` takes.

    Raises:
        UsageError: See `grass_lib.masks.fit`.
    """
    sizes = {str(spec): _mask_size(spec) for spec in specs if spec.needs_mask_file}
    if not sizes:
        return {}
    fitter = _Fitter(protocol, data, Path(folder), seed, resolve_device(device), progress)
    wanted = sorted(set(sizes.values()))
    if protocol.masks == "energy":
        by_size = [fitter.energy(checkpoint, wanted) for checkpoint in checkpoints]
    else:
        by_size = [fitter.learned(checkpoints[0], wanted)] * len(checkpoints)
    return {spec: [masks[size] for masks in by_size] for spec, size in sizes.items()}


def _mask_size(spec: CompressionSpec) -> int:
    stage = spec.sparsification if spec.sparsification.needs_mask_file else spec.projection
    size = stage.mask_size
    return int(stage.k or 0) if size is None else size


class _Fitter:
    """Fits masks of some sizes to one network's gradients, each kept as a file."""

    def __init__(self, protocol: Protocol, data: Photos, folder: Path, seed: int, device: str, progress: bool) -> None:
        self._protocol, self._data, self._folder = protocol, data, folder
        self._seed, self._device, self._progress = seed, device, progress
        folder.mkdir(parents=True, exist_ok=True)

    def energy(self, checkpoint: Mapping[str, Tensor], sizes: Sequence[int]) -> dict[int, Mask]:
        """Masks of the coordinates with the largest second moments."""
        model = self._model(checkpoint)
        origins = {size: {**self._origin(model, size), "method": "energy"} for size in sizes}
        masks = {size: self._kept(origin, size) for size, origin in origins.items()}
        if any(mask is None for mask in masks.values()):
            moments = second_moments(self._rows(model))
            for size, origin in origins.items():
                indices = top_k(moments, size)
                mask = Mask(indices.cpu(), len(moments), moments[indices].cpu(), origin)
                masks[size] = self._keep(mask, origin)
        return {size: mask for size, mask in masks.items() if mask is not None}

    def learned(self, checkpoint: Mapping[str, Tensor], sizes: Sequence[int]) -> dict[int, Mask]:
        """Selective Masks."""
        model = self._model(checkpoint)
        masks: dict[int, Mask] = {}
        for size in sizes:
            origin = self._origin(model, size)
            expected = {**origin, "method": "learned", "seed": str(self._seed)}
            masks[size] = self._kept(expected, size) or self._keep(
                fit(
                    self._rows(model),
                    size,
                    method="learned",
                    seed=self._seed,
                    provenance=origin,
                    progress=self._progress,
                    cache_bytes=_CACHE_BYTES,
                ),
                expected,
            )
        return masks

    def _model(self, checkpoint: Mapping[str, Tensor]) -> ResNet9:
        model = make_model(self._protocol)
        model.load_state_dict(dict(checkpoint))
        return model.to(self._device).eval()

    def _rows(self, model: ResNet9) -> GradientSource:
        n = self._protocol.fit_rows
        gradients = PerSampleGradients(model, margin, micro_batch=self._protocol.micro_batch)
        return GradientSource.from_model(gradients, batches(self._data.train_x[:n], self._data.train_y[:n]))

    def _origin(self, model: ResNet9, size: int) -> dict[str, str]:
        return {
            "model": model_sha256(model),
            "data": self._data.sha256,
            "rows": str(self._protocol.fit_rows),
            "spec": f"selective_mask-{size}",
        }

    def _path(self, expected: Mapping[str, str], size: int) -> Path:
        digest = hashlib.sha256(repr(sorted(expected.items())).encode()).hexdigest()[:16]
        return self._folder / f"{expected['method']}-{size}-{digest}.safetensors"

    def _kept(self, expected: Mapping[str, str], size: int) -> Mask | None:
        path = self._path(expected, size)
        if not path.is_file():
            return None
        mask = Mask.load(path)
        mask.check(size, self._protocol.sizes.parameters, dict(expected))
        return mask

    def _keep(self, mask: Mask, expected: Mapping[str, str]) -> Mask:
        mask.save(self._path(expected, len(mask.indices)))
        return mask

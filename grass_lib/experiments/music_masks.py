"""Masks of the largest mean squares, one for each model that TRAK uses and each size, from one walk over gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn
from tqdm import tqdm

from grass_lib.gradients import PerSampleGradients, margin
from grass_lib.gradients.full import batch_size
from grass_lib.gradients.outputs import Batch
from grass_lib.masks.energy import second_moments
from grass_lib.masks.objective import top_k
from grass_lib.masks.source import GradientSource
from grass_lib.projection import Mask
from grass_lib.specs import CompressionSpec


def energy_masks(
    model: nn.Module,
    checkpoints: Sequence[Mapping[str, Tensor]],
    loader: Sequence[Batch],
    compressions: Sequence[CompressionSpec],
    *,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, list[Mask]]:
    """The masks that selective compressions need.

    Args:
        model: The architecture.
        checkpoints: Those that TRAK uses, in its order.
        loader: The training windows, in the order of attribution.
        compressions: Those to compare; others than selective ones are passed over.
        device: Where to compute.
        progress: Shows a bar when it lasts.

    Returns:
        What TRAK takes as ``masks``: for each selective compression one mask for each checkpoint.

    Raises:
        UsageError: The gradients are not finite or all zero.
    """
    sizes = {str(spec): _kept(spec) for spec in compressions if spec.needs_mask_file}
    found: dict[str, list[Mask]] = {name: [] for name in sizes}
    if not found:
        return found
    gradients = PerSampleGradients(model, margin, device=device)
    n = sum(map(batch_size, loader))
    with tqdm(total=n * len(checkpoints), desc="masks", unit="sample", delay=3, disable=not progress) as bar:
        for checkpoint in checkpoints:
            state = gradients.bind(checkpoint)

            def walk(state=state) -> Iterator[Tensor]:
                for batch in loader:
                    yield gradients(state, batch)[0]
                    bar.update(batch_size(batch))

            energy = second_moments(GradientSource(walk, n, gradients.p, gradients.device))
            masks: dict[int, Mask] = {}
            for name, k in sizes.items():
                if k not in masks:
                    indices = top_k(energy, k)
                    facts = {"method": "energy", "n": str(n)}
                    masks[k] = Mask(indices.cpu(), gradients.p, energy[indices].cpu(), facts)
                found[name].append(masks[k])
    return found


def _kept(spec: CompressionSpec) -> int:
    """Coordinates that the mask of a selective compression keeps."""
    k = spec.projection.k if spec.sparsification.is_identity else spec.sparsification.k
    return 0 if k is None else k

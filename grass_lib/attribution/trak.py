"""TRAK: attribution by a linearised model in a compressed gradient space."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from grass_lib.attribution.features import FeatureAttributor, MaskChoice
from grass_lib.attribution.routes import GradientChoice
from grass_lib.attribution.solve import SolveMethod, damped_scores, damping_grid
from grass_lib.errors import UsageError
from grass_lib.gradients.outputs import Batch, Output, margin, margin_weight
from grass_lib.gradients.state import Checkpoint, ParameterFilter
from grass_lib.gradients.stream import PassTimings, clock
from grass_lib.projection import Projector
from grass_lib.specs import CompressionSpec

Convention = Literal["relative", "paper"]
Weight = Callable[[Tensor], Tensor]
CONVENTIONS: tuple[Convention, ...] = ("relative", "paper")


class TRAK(FeatureAttributor):
    """TRAK (Park et al. 2023) with the compressions of GraSS (section 4.1 of the paper is about this use).

    With features ``phi_c`` (projected gradients of the output at checkpoint c) and ``Phi_c`` those of the training set,

        score[i, q] = mean_c( phi_c(q) (Phi_c^T Phi_c + lambda I)^-1 phi_c(i) ) * mean_c( weight_c(i) ).

    A positive score means that training on the sample raises the query's output.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Sequence[Checkpoint],
        *,
        sparsification: str = "identity",
        projection: str = "identity",
        specs: Sequence[CompressionSpec | str] | None = None,
        output: Output = margin,
        weight: Weight = margin_weight,
        convention: Convention = "relative",
        method: SolveMethod = "auto",
        seed: int = 0,
        device: str | torch.device | None = None,
        micro_batch: int | None = None,
        masks: MaskChoice | Mapping[str, MaskChoice] | None = None,
        backend: str = "auto",
        cache_device: str | torch.device | None = None,
        parameters: ParameterFilter | None = None,
        buffer_bytes: int | None = None,
        dtype: torch.dtype = torch.float32,
        progress: bool = True,
        gradients: GradientChoice = "auto",
    ) -> None:
        """Sets TRAK up; arguments not listed here are those of :class:`FeatureAttributor`.

        Args:
            model: The architecture.
            checkpoints: The ensemble.
            sparsification: First stage of the compression.
            projection: Second stage of the compression.
            specs: Several compressions at once, instead of the pair.
            output: ``output(model, batch) -> (batch,)``, the output that is linearised.
            weight: Weights ``(n_train,)`` of the training samples from their output values; the default, one minus the
                probability of the right class, belongs to :func:`margin`.
            convention: ``"relative"`` multiplies damping with the mean eigenvalue ``tr(Phi^T Phi) / k``. ``"paper"``
                takes it as an absolute number on features scaled as in the reference implementation (gradients divided
                by ``sqrt(p)``, its operators' own scales).
            method: Of the solve; see :func:`damped_scores`.
            seed: Of the random projections.
            device: Where to compute.
            micro_batch: At most so many samples go through the model at once.
            masks: For selective types; refused where no spec takes one.
            backend: As in ``build_projector``.
            cache_device: Where the training features are kept.
            parameters: Keeps some of the trainable weights.
            buffer_bytes: Gradient rows collected before projecting.
            dtype: Of the cached features.
            progress: Shows a bar for work that lasts more than 3 s.
            gradients: "full", "masked" or "auto".

        Raises:
            UsageError: If an argument does not fit the model or is out of range.
        """
        if convention not in CONVENTIONS:
            raise UsageError(f"convention is {convention!r}; expected one of {', '.join(CONVENTIONS)}.")
        self.convention = convention
        self._weight = weight
        self._method: SolveMethod = method
        self._scales: dict[str, float] = {}
        super().__init__(
            model,
            checkpoints,
            sparsification=sparsification,
            projection=projection,
            specs=specs,
            output=output,
            seed=seed,
            device=device,
            micro_batch=micro_batch,
            masks=masks,
            backend=backend,
            cache_device=cache_device,
            parameters=parameters,
            buffer_bytes=buffer_bytes,
            dtype=dtype,
            progress=progress,
            gradients=gradients,
        )

    def attribute(
        self, query_loader: Iterable[Batch], damping: float | Sequence[float] | Tensor = 0.1
    ) -> Tensor | dict[str, Tensor]:
        """Scores of all training samples for all queries; one gradient pass over the queries per checkpoint.

        Args:
            query_loader: Yields query batches, in the same form as the training batches.
            damping: One value, or a grid that shares the gradients and the Gram matrix.

        Returns:
            ``(n_train, n_query)``, or ``(n_damping, n_train, n_query)`` for a grid, in float32 (float64
            with that dtype) on the device of the computation; a dict of these by spec string where ``specs=`` was
            given.

        Raises:
            UsageError: If nothing is cached, the loader is empty or a damping value is out of range.
            GrassError: If a gradient is not finite or a system cannot be solved.
        """
        grid, single = damping_grid(damping)
        self._require_cache()
        timings, seconds = PassTimings(), dict.fromkeys(map(str, self.specs), 0.0)
        scores: dict[str, Tensor] = {}
        with self._bar(query_loader, "attribution", 1 + len(self.specs)) as bar:
            for index, features, values in self._walk(query_loader, bar, timings, self.device):
                for name in seconds:
                    start = clock(self.device)
                    if name not in scores:
                        shape = (len(grid), self.n_train, len(values))
                        scores[name] = torch.zeros(shape, device=self.device, dtype=self._gradients.dtype)
                    damped_scores(
                        self._train[index][name].to(self.device),
                        features.pop(name),
                        self._absolute(grid, name),
                        relative=self.convention == "relative",
                        method=self._method,
                        out=scores[name],
                    )
                    seconds[name] += clock(self.device) - start
                    bar.update(len(values))
        weights = torch.stack([self._weight(values) for values in self._train_values]).mean(dim=0).to(self.device)
        for tensor in scores.values():
            tensor.mul_((weights / self.n_checkpoints).to(tensor.dtype)[:, None])
        self._add_query_timings(timings, seconds)
        return self._result({name: tensor[0] if single else tensor for name, tensor in scores.items()})

    def _absolute(self, grid: list[float], name: str) -> list[float]:
        """Damping for unscaled features: ``s q (s^2 G + d)^-1 s phi`` is ``q (G + d / s^2)^-1 phi``."""
        if self.convention == "relative":
            return grid
        return [value / self._scales[name] ** 2 for value in grid]

    def _build_projectors(self, checkpoint: int, timings: PassTimings | None = None) -> dict[str, Projector]:
        built = super()._build_projectors(checkpoint, timings)
        self._scales = {name: projector.paper_scale / math.sqrt(self.p) for name, projector in built.items()}
        return built

"""Baselines without a Gram matrix: inner products and cosines of compressed gradients."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from grass_lib.attribution.features import FeatureAttributor, FeatureOptions
from grass_lib.attribution.routes import refuse_unused_masks
from grass_lib.errors import UsageError
from grass_lib.gradients.outputs import Batch, Output, cross_entropy
from grass_lib.gradients.state import Checkpoint
from grass_lib.gradients.stream import PassTimings, clock


class _Similarity(FeatureAttributor, ABC):
    """A similarity of training and query features, summed over checkpoints."""

    def attribute(self, query_loader: Iterable[Batch]) -> Tensor | dict[str, Tensor]:
        """Scores of all training samples for all queries; one gradient pass over the queries per checkpoint.

        Args:
            query_loader: Yields query batches, in the same form as the training batches.

        Returns:
            ``(n_train, n_query)`` in float32 (float64 with that dtype) on the device of the computation, or a dict of
            these by spec string where ``specs=`` was given.

        Raises:
            UsageError: If nothing is cached or the loader is empty.
            GrassError: If a gradient is not finite.
        """
        self._require_cache()
        timings, seconds = PassTimings(), dict.fromkeys(map(str, self.specs), 0.0)
        scores: dict[str, Tensor] = {}
        with self._bar(query_loader, "attribution", 1 + len(self.specs)) as bar:
            for index, features, values in self._walk(query_loader, bar, timings, self.device):
                for name in seconds:
                    start = clock(self.device)
                    query = self._prepared(features.pop(name))
                    found = self._prepared(self._train[index][name].to(self.device)) @ query.mT
                    found *= self._checkpoint_weight(index)
                    scores[name] = found if name not in scores else scores[name].add_(found)
                    seconds[name] += clock(self.device) - start
                    bar.update(len(values))
        self._add_query_timings(timings, seconds)
        return self._result(scores)

    def _prepared(self, features: Tensor) -> Tensor:
        return features.float() if features.dtype == torch.bfloat16 else features

    @abstractmethod
    def _checkpoint_weight(self, checkpoint: int) -> float:
        """The factor of a checkpoint in the sum."""


class TracIn(_Similarity):
    """TracIn (Pruthi et al. 2020, TracInCP): ``score[i, q] = sum_c lr_c <g_c(i), g_c(q)>`` with loss gradients.

    A positive score means that a training step on the sample lowers the query's loss. Random types keep inner products
    in expectation, so that scores of different specs are on one scale.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Sequence[Checkpoint],
        *,
        learning_rates: float | Sequence[float] = 1.0,
        output: Output = cross_entropy,
        **options: Unpack[FeatureOptions],
    ) -> None:
        """Sets TracIn up.

        Args:
            model: The architecture.
            checkpoints: Checkpoints along the training run.
            learning_rates: Weight of each checkpoint, or one for all.
            output: The loss, ``output(model, batch) -> (batch,)``, lower is better.
            **options: Those of :class:`FeatureAttributor`.

        Raises:
            UsageError: If an argument does not fit.
        """
        super().__init__(model, checkpoints, output=output, **options)
        refuse_unused_masks(self.specs, options.get("masks"))
        rates = [learning_rates] * len(checkpoints) if isinstance(learning_rates, int | float) else learning_rates
        if len(rates) != len(checkpoints):
            raise UsageError(
                f"There are {len(rates)} learning rates for {len(checkpoints)} checkpoints; expected one each."
            )
        for rate in rates:
            if not 0.0 <= rate < float("inf"):
                raise UsageError(f"A learning rate is {rate}; expected a finite number, at least 0.")
        self._rates = [float(rate) for rate in rates]

    def _checkpoint_weight(self, checkpoint: int) -> float:
        return self._rates[checkpoint]


class GradientCosine(_Similarity):
    """Cosine of the loss gradients of training sample and query, averaged over checkpoints; in [-1, 1].

    A sample whose gradient is zero has similarity 0 with everything.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Sequence[Checkpoint],
        *,
        output: Output = cross_entropy,
        **options: Unpack[FeatureOptions],
    ) -> None:
        """Sets the cosine baseline up.

        Args:
            model: The architecture.
            checkpoints: The ensemble.
            output: The loss, ``output(model, batch) -> (batch,)``, lower is better.
            **options: Those of :class:`FeatureAttributor`.

        Raises:
            UsageError: If an argument does not fit.
        """
        super().__init__(model, checkpoints, output=output, **options)
        refuse_unused_masks(self.specs, options.get("masks"))

    def _prepared(self, features: Tensor) -> Tensor:
        rows = super()._prepared(features)
        # Scaled by the largest entry first, so that squares of very small gradients do not underflow to a zero norm.
        largest = rows.abs().amax(dim=1, keepdim=True)
        rows = rows / torch.where(largest > 0, largest, 1.0)
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return rows / torch.where(norm > 0, norm, 1.0)

    def _checkpoint_weight(self, checkpoint: int) -> float:
        return 1.0 / self.n_checkpoints

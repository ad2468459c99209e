"""The noise ceiling of a bank: how well the models' own randomness lets any attributor do.

Two models of one subset that differ in their seed share what the subset decides and differ in the rest. If r is the
correlation between the two over subsets, the correlation of one of them with the noise-free value is about sqrt(r)
(the reliability index of classical test theory), and no prediction from the subset alone can be expected to beat it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.evaluation.bootstrap import correlation_interval
from grass_lib.evaluation.ranks import spearman
from grass_lib.evaluation.retraining import RetrainingBank


@dataclass(frozen=True)
class NoiseCeiling:
    """About the best LDS that is possible on a bank.

    Attributes:
        mean: Mean over queries of sqrt(max(r, 0)), r the Spearman correlation between two seeds over the subsets.
        interval: Bootstrap interval over models and queries.
        n_models: Subsets trained with two seeds.
    """

    mean: float
    interval: tuple[float, float]
    n_models: int


def noise_ceiling(
    bank: RetrainingBank, columns: Tensor, *, confidence: float = 0.95, n_bootstrap: int = 1000, seed: int = 0
) -> NoiseCeiling | None:
    """The noise ceiling from the subsets that were trained with two seeds.

    Args:
        bank: The retrained models.
        columns: int64 indices of queries.
        confidence: Of the interval.
        n_bootstrap: Bootstrap replicates.
        seed: Of the bootstrap.

    Returns:
        The ceiling; None where fewer than three subsets have a second seed or no query varies.
    """
    if bank.outputs.shape[1] < 2:
        return None
    paired = bank.outputs[:, 1].isfinite().all(dim=1)
    if int(paired.sum()) < 3:
        return None
    outputs = bank.outputs[paired].to(torch.float64)[:, :, columns]

    def reliability(rho: Tensor) -> Tensor:
        return rho.clamp(min=0.0).sqrt()  # a NaN stays one

    values = reliability(spearman(outputs[:, 0], outputs[:, 1]))
    if bool(values.isnan().all()):
        return None
    mean = float(values.nanmean())
    interval = correlation_interval(
        outputs[:, 0],
        outputs[:, 1],
        reliability,
        estimate=mean,
        lowest=0.0,
        confidence=confidence,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )
    return NoiseCeiling(mean=mean, interval=interval, n_models=int(paired.sum()))

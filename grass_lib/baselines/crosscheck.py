"""Whether two systems compute the same thing: theirs, against ours on their own random matrices."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grass_lib.attribution import TRAK, InfluenceFunction
from grass_lib.baselines.models import build_model, layer_names
from grass_lib.baselines.reference import ekfac_scores
from grass_lib.baselines.systems import (
    BergsonOptions,
    DattriOptions,
    KronfluenceOptions,
    LogIXOptions,
    Options,
)
from grass_lib.baselines.workload import Outcome, Workload
from grass_lib.errors import UsageError
from grass_lib.gradients import causal_loss, causal_margin

FEW = 48
"""Training sequences of a check, and queries at most."""
DAMPING = 0.1
LIMIT = 0.999
"""Least Spearman correlation that counts as the same."""
TRAK_LAYER = "transformer.ln_f"
"""Whose weights TRAK is compared on without a projection, so that both have the same gradients."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        options: Of the other system.
        ours: What it is compared with, in words.
        compute: Gives our scores ``(n_train, n_query)`` from the workload and the other system's matrices.
        rest: Why the two do not agree to the last bit.
    """

    options: Options
    ours: str
    compute: Callable[[Workload, Mapping[str, Tensor]], Tensor]
    rest: str


def checks(system: str, k: int = 16) -> list[Check]:
    """The comparisons for one system, small ones.

    Args:
        system: Its key.
        k: Compressed size of a layer, a square.
    """
    side = int(k**0.5)
    small = {"dampings": (DAMPING,), "few": FEW, "keep_matrices": True}
    factors, given = f"normal-{side}*{side}", "with its matrices"
    rounding = "float32 sums in another order"
    inverse = f"{rounding}; a float32 inverse where ours has eigenvectors in float64"
    found: dict[str, list[Check]] = {
        "logix": [
            Check(
                LogIXOptions(rank=side, **small),
                f"LoGra {given}, eFIM",
                _influence(factors),
                inverse,
            ),
            Check(
                LogIXOptions(rank=side, init="pca", **small),
                "LoGra with its principal components as matrices, eFIM",
                _influence(factors),
                inverse,
            ),
            Check(
                LogIXOptions(rank=side, hessian="none", few=FEW, keep_matrices=True),
                f"LoGra {given}, identity",
                _influence(factors, hessian="Identity"),
                rounding,
            ),
            Check(
                LogIXOptions(rank=side, hessian="ekfac", **small),
                f"EK-FAC from its definition, {given}, in float64",
                _ekfac,
                "float32 sums, and eigenvectors of float32 second moments",
            ),
        ],
        "dattri": [
            Check(DattriOptions(k=k, **small), f"LoGra {given}, eFIM", _influence(factors), inverse),
            Check(
                DattriOptions(method="factgrass", k=k, **small),
                f"masks and second stage {given}, eFIM",
                _influence(f"normal-{2 * side}*{2 * side}", f"normal-{k}"),
                inverse,
            ),
            Check(
                DattriOptions(
                    method="trak", k=0, layer=f"{TRAK_LAYER}.weight,{TRAK_LAYER}.bias", dampings=(DAMPING,), few=FEW
                ),
                "TRAK, paper's convention, same weights",
                _trak,
                "a float32 solve where ours is in float64",
            ),
        ],
        "bergson": [
            Check(BergsonOptions(side=side, **small), f"LoGra {given}, eFIM", _influence(factors), rounding),
            Check(
                BergsonOptions(side=0, include_bias=True, hessian="none", few=FEW),
                "whole gradients, identity",
                _influence("identity", hessian="Identity"),
                rounding,
            ),
        ],
        "kronfluence": [
            Check(
                KronfluenceOptions(strategy="identity", few=FEW),
                "whole gradients, identity",
                _influence("identity", hessian="Identity"),
                rounding,
            ),
            Check(
                KronfluenceOptions(dampings=(DAMPING,), few=FEW),
                "EK-FAC from its definition, in float64",
                _ekfac,
                "float32 sums, and eigenvectors of float32 second moments",
            ),
        ],
    }
    return found.get(system, [])


def judge(workload: Workload, check: Check, outcome: Outcome) -> dict[str, Any]:
    """Compares the scores of one check.

    Args:
        workload: The whole workload; the check's part of it is taken.
        check: The check.
        outcome: What the other system gave.

    Returns:
        ``{system, theirs, ours, spearman, largest_difference, same, rest}``: Spearman is the lowest over queries, the
        difference that of scores scaled to one size, over the largest score.
    """
    if outcome.scores is None:
        raise UsageError("the outcome has no scores; expected a workload with queries")
    ours = check.compute(workload.first(check.options.few), outcome.tensors).double().cpu()
    theirs = outcome.scores[0].double()
    worst = float(spearman(ours, theirs).min())
    factor = float((ours * theirs).sum() / theirs.square().sum())
    difference = float((ours - factor * theirs).abs().max() / ours.abs().max())
    return {
        "system": outcome.system,
        "theirs": outcome.label,
        "ours": check.ours,
        "spearman": worst,
        "largest_difference": difference,
        "factor": factor,
        "same": worst >= LIMIT,
        "rest": check.rest,
    }


def spearman(one: Tensor, other: Tensor) -> Tensor:
    """Rank correlation over training samples, for each query.

    Ranks come from sorting, so that thousands of samples are no matter.

    Args:
        one: ``(n_train, n_query)``.
        other: The same shape.

    Returns:
        float64 ``(n_query,)``; 0 where a column is constant.
    """
    return _product(_ranks(one), _ranks(other))


def _ranks(scores: Tensor) -> Tensor:
    """Average ranks of each column, centred and of length 1."""
    columns = []
    for column in scores.double().cpu().unbind(dim=1):
        _, place, counts = torch.unique(column, return_inverse=True, return_counts=True)
        ends = counts.cumsum(0).double()
        columns.append((ends - (counts - 1) / 2)[place])
    ranks = torch.stack(columns, dim=1)
    ranks -= ranks.mean(dim=0)
    return ranks / ranks.norm(dim=0).clamp_min(1e-300)


def _product(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(dim=0)


def correlations(scores: Sequence[Tensor]) -> Tensor:
    """Mean Spearman correlation over queries between all pairs of score matrices ``(m, m)``.

    Args:
        scores: ``(n_train, n_query)`` each.
    """
    ranks = [_ranks(each) for each in scores]
    return torch.tensor([[float(_product(one, other).mean()) for other in ranks] for one in ranks], dtype=torch.float64)


def _loader(workload: Workload, ids: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": part, "labels": part} for part in ids.split(workload.batch_size)]


def _model(workload: Workload) -> tuple[Any, list[str]]:
    model = build_model(replace(workload.shape, dtype="float32"), workload.weights, workload.device)
    return model, layer_names(model)


def _influence(
    sparsification: str, projection: str = "identity", *, hessian: str = "eFIM"
) -> Callable[[Workload, Mapping[str, Tensor]], Tensor]:
    def compute(workload: Workload, matrices: Mapping[str, Tensor]) -> Tensor:
        model, layers = _model(workload)
        influence = InfluenceFunction(
            model,
            causal_loss,
            layers=layers,
            sparsification=sparsification,
            projection=projection,
            hessian=hessian,
            matrices=matrices or None,
            progress=False,
        )
        influence.cache(_loader(workload, workload.train_ids))
        return influence.attribute(_loader(workload, workload.query_ids), damping=DAMPING)

    return compute


def _ekfac(workload: Workload, matrices: Mapping[str, Tensor]) -> Tensor:
    model, layers = _model(workload)
    return ekfac_scores(
        model, layers, workload.train_ids, workload.query_ids, matrices=matrices or None, damping=DAMPING
    )


def _trak(workload: Workload, matrices: Mapping[str, Tensor]) -> Tensor:
    """Ours divides gradients by the root of the chosen weights' number, dattri by that of all; the damping follows."""
    model, _ = _model(workload)
    trak = TRAK(
        model,
        [model.state_dict()],
        output=causal_margin,
        convention="paper",
        parameters=lambda name, _: name.startswith(TRAK_LAYER),
        progress=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*batching rule")  # attention on a CPU, one sample at a time
        trak.cache(_loader(workload, workload.train_ids))
        everything = sum(own.numel() for own in model.parameters())
        scores = trak.attribute(_loader(workload, workload.query_ids), damping=DAMPING * everything / trak.p)
    if not isinstance(scores, Tensor):
        raise UsageError("TRAK gave scores of several compressions; expected one")
    return scores

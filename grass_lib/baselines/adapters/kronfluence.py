"""kronfluence: Kronecker-factored curvature and pairwise scores on whole gradients."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.baselines.adapters.base import Adapter
from grass_lib.baselines.models import sequence_losses
from grass_lib.baselines.systems import KronfluenceOptions
from grass_lib.baselines.workload import Workload
from grass_lib.errors import BaselineError

DEFAULT_DAMPING = 1e-8


class KronfluenceAdapter(Adapter):
    """Factors are fitted by ``cache``; gradients of the training set are not kept, but computed again with the scores.

    Damping: kronfluence takes an absolute value, or None for 0.1 times the mean eigenvalue of each layer. That relative
    default is the one of its values that the other systems can be given too.
    """

    options: KronfluenceOptions

    def _analyzer(self) -> Any:
        kronfluence = importlib.import_module("kronfluence.analyzer")
        layers = self.layers

        class Blocks(importlib.import_module("kronfluence.task").Task):
            def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
                if not sample:
                    return sequence_losses(model, batch).sum()
                logits = model(input_ids=batch).logits[:, :-1].float().flatten(0, 1)
                with torch.no_grad():
                    drawn = torch.multinomial(logits.softmax(dim=-1), 1).flatten()
                return torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")

            def compute_measurement(self, batch: Any, model: Any) -> Tensor:
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self) -> list[str]:
                return layers

        task = Blocks()
        model = kronfluence.prepare_model(self.model, task)
        return kronfluence.Analyzer(
            analysis_name="factors",
            model=model,
            task=task,
            cpu=self.workload.device == "cpu",
            output_dir=str(self.folder / "results"),
            disable_tqdm=True,
        )

    def cache(self) -> None:
        """Covariances, eigenvectors and corrected eigenvalues, as the strategy needs them."""
        arguments = importlib.import_module("kronfluence.arguments")
        self._analysis = self._analyzer()
        self._factors = arguments.FactorArguments(
            strategy=self.options.strategy, use_empirical_fisher=self.options.empirical
        )
        with self.phases("curvature"):
            self._analysis.fit_all_factors(
                factors_name="factors",
                dataset=_Rows(self.workload.train_ids),
                per_device_batch_size=self.workload.batch_size,
                factor_args=self._factors,
            )
        self.details = {"layers": len(self.layers), "stores": "factors only"}

    @property
    def dampings(self) -> tuple[float | None, ...]:
        """One value: the relative default 0.1, or the library's absolute one where none is asked for."""
        return self.options.dampings[:1] or (None,)

    def attribute(self) -> Tensor:
        """One pass over the training set for all queries of a batch."""
        arguments = importlib.import_module("kronfluence.arguments")
        if self.options.dampings and self.options.dampings[0] != 0.1:
            raise BaselineError(
                f"kronfluence has one relative damping, 0.1, and was given {self.options.dampings[0]}; leave it out "
                f"for its absolute default of {DEFAULT_DAMPING}"
            )
        damping = None if self.options.dampings else DEFAULT_DAMPING
        with self.phases("scoring"):
            self._analysis.compute_pairwise_scores(
                scores_name="scores",
                factors_name="factors",
                query_dataset=_Rows(self.workload.query_ids),
                train_dataset=_Rows(self.workload.train_ids),
                per_device_query_batch_size=self.workload.batch_size,
                per_device_train_batch_size=self.workload.batch_size,
                score_args=arguments.ScoreArguments(damping_factor=damping),
            )
        return self._analysis.load_pairwise_scores("scores")["all_modules"].mT[None].float()


class _Rows(torch.utils.data.Dataset):
    def __init__(self, ids: Tensor) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, place: int) -> Tensor:
        return self._ids[place]


def facts(workload: Workload, folder: Path) -> list[dict[str, Any]]:
    """What kronfluence does when it is used as documented."""
    scores = []
    for number, options in enumerate(
        (KronfluenceOptions(empirical=False), KronfluenceOptions(), KronfluenceOptions(dampings=(0.1,)))
    ):
        place = folder / str(number)
        place.mkdir()
        adapter = KronfluenceAdapter(workload, options, place)
        adapter.cache()
        scores.append(adapter.attribute()[0])
    sampled, absolute, relative = scores
    return [
        {
            "what": "EK-FAC with default arguments, and with use_empirical_fisher=True",
            "expected": "two curvatures",
            "seen": f"correlation {_correlation(sampled, absolute):.3f} between their scores",
            "why": "labels are drawn from the model by default; the other systems here use those of the data",
        },
        {
            "what": "damping_factor left at 1e-8, and None",
            "expected": "two dampings",
            "seen": f"correlation {_correlation(absolute, relative):.3f} between their scores",
            "why": "the default is an absolute 1e-8; None is 0.1 times the mean eigenvalue of each layer, which the "
            "other systems can be given too",
        },
    ]


def _correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


ADAPTER = KronfluenceAdapter

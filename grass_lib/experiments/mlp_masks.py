"""Which coordinates matter? Masks for MLP + MNIST, fitted at the models that TRAK uses."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grass_lib.attribution.model_hash import model_sha256
from grass_lib.errors import UsageError
from grass_lib.experiments import mlp_mnist
from grass_lib.experiments.base import resolve_device
from grass_lib.experiments.data.mnist import Digits
from grass_lib.experiments.mlp_mnist import Protocol, batches, make_model
from grass_lib.experiments.models.mlp import PARAMETERS
from grass_lib.gradients import PerSampleGradients, margin
from grass_lib.masks import METHODS, GradientSource, fit, hard_mask_correlation
from grass_lib.masks.overlap import overlap
from grass_lib.projection import Mask

PAPER_WAY = "learned (paper)"
"""Selective Mask with the paper's own schedule, which takes minutes a mask on a GPU and longer on a CPU."""
WAYS = (*METHODS, PAPER_WAY)


@dataclass(frozen=True)
class Study:
    """Sizes of one scale.

    Attributes:
        protocol: Of MLP + MNIST, with the models of both kinds.
        ks: Numbers of kept coordinates.
        n_seeds: Masks of each method that draws numbers.
        fit_rows: Training digits that masks are fitted to.
        check_queries: Query digits that correlations are measured on.
        ways: Methods to compare; the first is what the others are compared with.
    """

    protocol: Protocol
    ks: tuple[int, ...]
    n_seeds: int
    fit_rows: int
    check_queries: int
    ways: tuple[str, ...] = METHODS


def study(scale: str, *, ks: str = "", ways: str = "", n_seeds: int = 0, n_lds: int = 0, n_trak: int = 0) -> Study:
    """The sizes of a scale.

    Args:
        scale: ``embedded`` or ``paper``.
        ks: Other numbers of coordinates, with commas between them.
        ways: Others of `WAYS` with commas between them; the random mask is always among them.
        n_seeds: Another number of seeds; 0 for the scale's own.
        n_lds: As in `mlp_mnist.protocol`.
        n_trak: As in `mlp_mnist.protocol`.

    Raises:
        UsageError: A value is out of range.
    """
    if n_seeds < 0:
        raise UsageError(f"n_seeds is {n_seeds}; expected 1 or more, or 0 for the scale's own number")
    embedded = scale == "embedded"
    protocol = mlp_mnist.protocol(scale, n_lds=n_lds, n_trak=n_trak or (2 if embedded else 0))
    own = (256, 1024) if embedded else (2048, 4096, 8192)
    try:
        chosen = tuple(int(word) for word in ks.split(",")) if ks.strip() else own
    except ValueError:
        raise UsageError(f"ks is {ks!r}; expected whole numbers with commas between them, such as 256,1024") from None
    if len(set(chosen)) != len(chosen) or not all(3 <= k <= PARAMETERS for k in chosen):
        raise UsageError(f"ks is {ks!r}; expected different numbers from 3 to {PARAMETERS}")
    asked = tuple(word.strip() for word in ways.split(",") if word.strip()) or METHODS
    unknown = [way for way in asked if way not in WAYS]
    if unknown:
        raise UsageError(f"ways has {', '.join(map(repr, unknown))}; expected some of {', '.join(WAYS)}")
    return Study(
        protocol=protocol,
        ks=tuple(sorted(chosen)),
        n_seeds=n_seeds or (1 if embedded else 5),
        fit_rows=1000 if embedded else protocol.n_train,
        check_queries=200 if embedded else 500,
        ways=tuple(way for way in WAYS if way in asked or way == "random"),
    )


def is_random(way: str) -> bool:
    """Whether a method gives another mask for another seed."""
    return way not in ("energy", "leverage")


@dataclass(frozen=True, eq=False)
class FittedMask:
    """A mask and what it cost.

    Attributes:
        mask: The mask.
        seconds: Of fitting it, gradients included.
    """

    mask: Mask
    seconds: float


class MaskFitter:
    """Fits masks at given checkpoints, or reads those that an earlier run fitted."""

    def __init__(
        self,
        checkpoints: Sequence[Mapping[str, Tensor]],
        data: Digits,
        folder: str | Path,
        *,
        fit_rows: int | None = None,
        device: str = "auto",
        progress: bool = True,
    ) -> None:
        """Remembers where everything is.

        Args:
            checkpoints: State dicts of the MLP.
            data: Training digits, in the order of the checkpoints' subsets.
            folder: Where masks are kept.
            fit_rows: Fits to so many of the training digits, the first ones; None for all.
            device: Where to compute.
            progress: Shows a bar when fitting lasts.
        """
        self._checkpoints, self._data, self._folder = checkpoints, data, Path(folder)
        self._rows = len(data.train_y) if fit_rows is None else min(fit_rows, len(data.train_y))
        self._device, self._progress = resolve_device(device), progress
        self._folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, way: str, k: int, checkpoint: int, *, seed: int = 0) -> FittedMask:
        """One mask.

        Args:
            way: One of `WAYS`.
            k: Number of coordinates.
            checkpoint: Which checkpoint's gradients.
            seed: Of the mask.
        """
        model = self._model(checkpoint)
        method, recipe = ("learned", "paper") if way == PAPER_WAY else (way, "default")
        origin = {
            "model": model_sha256(model),
            "data": self._data.sha256,
            "rows": str(self._rows),
            "spec": f"selective_mask-{k}",
            "recipe": recipe,
        }
        expected = {**origin, "method": method, "seed": str(seed)}
        digest = hashlib.sha256(repr(sorted(expected.items())).encode()).hexdigest()[:16]
        file = self._folder / f"{method}-{k}-{digest}.safetensors"
        if file.is_file():
            mask = Mask.load(file)
            mask.check(k, PARAMETERS, expected)
        else:
            start = time.perf_counter()
            options: dict[str, Any] = {"recipe": "paper"} if recipe == "paper" else {}
            mask = fit(
                self._train(model),
                k,
                method=method,
                seed=seed,
                # Masks of several checkpoints are different draws.
                name="" if checkpoint == 0 else f"checkpoint {checkpoint}",
                provenance=origin,
                progress=self._progress,
                **options,
            )
            seconds = time.perf_counter() - start
            mask = Mask(mask.indices, mask.p, mask.scores, {**mask.provenance, "seconds": f"{seconds:.3f}"})
            mask.save(file)
        return FittedMask(mask, float(mask.provenance["seconds"]))

    def correlation(self, masks: Sequence[Mask], checkpoint: int, n_query: int) -> list[float]:
        """Mean Spearman correlation of full and masked inner products, of queries with training samples.

        Holds the gradients of the training rows, ``4 n p`` bytes.

        Args:
            masks: Masks.
            checkpoint: Whose gradients.
            n_query: So many of the query digits, which no mask was fitted to.
        """
        model = self._model(checkpoint)
        rows = GradientSource.from_tensor(torch.cat([block.clone() for block in self._train(model)]))
        gradients = PerSampleGradients(model, margin)
        asked = GradientSource.from_model(
            gradients, batches(self._data.query_x[:n_query], self._data.query_y[:n_query])
        )
        return [hard_mask_correlation(rows, asked, mask.indices.to(self._device))[0] for mask in masks]

    def _model(self, checkpoint: int) -> Any:
        model = make_model()
        model.load_state_dict(dict(self._checkpoints[checkpoint]))
        return model.to(self._device).eval()

    def _train(self, model: Any) -> GradientSource:
        x, y = self._data.train_x[: self._rows], self._data.train_y[: self._rows]
        return GradientSource.from_model(PerSampleGradients(model, margin), batches(x, y))


def layer_shares(mask: Mask) -> dict[str, tuple[int, int]]:
    """Kept coordinates and size of every weight and bias, by name."""
    shares, start = {}, 0
    for name, value in make_model().named_parameters():
        size = value.numel()
        shares[name] = (int(((mask.indices >= start) & (mask.indices < start + size)).sum()), size)
        start += size
    return shares


def pixel_counts(mask: Mask) -> Tensor:
    """How many weights of the first layer are kept for each pixel, int64 ``(28, 28)``."""
    first = next(iter(make_model().parameters()))
    kept = mask.indices[mask.indices < first.numel()] % first.shape[1]
    return torch.bincount(kept, minlength=first.shape[1]).reshape(28, 28)


def mean_overlap(first: Sequence[Mask], second: Sequence[Mask]) -> float:
    """Mean share of coordinates that two masks have in common, over all pairs of different masks."""
    values = [overlap(a.indices, b.indices) for a in first for b in second if a is not b]
    return sum(values) / len(values) if values else 1.0


def validate(scale: str, parameters: Mapping[str, Any]) -> None:
    """Checks the notebook's parameters before anything runs.

    Raises:
        UsageError: A value that cannot work.
    """
    study(
        scale,
        ks=parameters["ks"],
        ways=parameters["ways"],
        n_seeds=parameters["n_seeds"],
        n_lds=parameters["n_lds_models"],
        n_trak=parameters["n_trak_models"],
    )
    resolve_device(parameters["device"])


check = mlp_mnist.check
data_fingerprint = mlp_mnist.data_fingerprint

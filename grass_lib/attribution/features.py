"""What gradient-based attributors share: checkpoints, compression specs and cached features of the training set."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor, nn
from tqdm import tqdm

from grass_lib.attribution.routes import GradientChoice, GradientRoute, refuse_unused_masks
from grass_lib.devices import usable_device
from grass_lib.errors import SpecError, UsageError
from grass_lib.gradients.full import PerSampleGradients
from grass_lib.gradients.order import WatchedLoader, check_order
from grass_lib.gradients.outputs import Batch, Output
from grass_lib.gradients.state import Checkpoint, ParameterFilter, check_fit, checkpoint_shapes, load_checkpoint
from grass_lib.gradients.stream import PassTimings, clock, progress_bar, project_loader, sample_count
from grass_lib.projection import Mask, Projector, build_projector
from grass_lib.seeds import check_seed
from grass_lib.specs import CompressionSpec, parse_specs

MaskSource: TypeAlias = Mask | str | Path
MaskChoice: TypeAlias = MaskSource | Sequence[MaskSource]
"""One mask for all checkpoints, or one for each."""
FEATURE_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class FeatureOptions(TypedDict, total=False):
    """Keyword arguments that every attributor takes; :class:`FeatureAttributor` explains them."""

    sparsification: str
    projection: str
    specs: Sequence[CompressionSpec | str] | None
    seed: int
    device: str | torch.device | None
    micro_batch: int | None
    masks: MaskChoice | Mapping[str, MaskChoice] | None
    backend: str
    cache_device: str | torch.device | None
    parameters: ParameterFilter | None
    buffer_bytes: int | None
    dtype: torch.dtype
    progress: bool
    gradients: GradientChoice


class FeatureAttributor:
    """Compressed per-sample gradients of the training set, for several checkpoints and compression specs at once.

    Each walk over a loader computes every gradient once per checkpoint, whatever the number of specs. Checkpoint c
    draws its projections from the random stream of checkpoint c.

    Attributes:
        specs: The compression specs; their strings are the keys of results.
        backends: Whose code projects, by spec, with ``+masked`` where ``gradients`` is "masked".
        gradients: "masked" where only the coordinates that masks keep are computed, else "full".
        timings: Seconds. ``gradients``, ``projection`` (by spec, building the operator included) and
            ``projection_by_checkpoint`` (a list by spec) are those of :meth:`cache`; ``query_gradients``,
            ``query_projection`` and ``scores`` (by spec) those of the last ``attribute``.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Sequence[Checkpoint],
        *,
        sparsification: str = "identity",
        projection: str = "identity",
        specs: Sequence[CompressionSpec | str] | None = None,
        output: Output,
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
        """Checks everything that can be checked before data is read.

        Args:
            model: The architecture; it is left exactly as it is found, its device included.
            checkpoints: State dicts or paths of safetensors files, read one at a time.
            sparsification: First stage of the compression, ``"identity"`` for none.
            projection: Second stage.
            specs: Several compressions in one gradient pass, instead of the pair; results are then dicts by spec
                string.
            output: ``output(model, batch) -> (batch,)``, the value that is differentiated.
            seed: Of the random projections.
            device: Where to compute; None for the device of the model's parameters.
            micro_batch: At most so many samples go through the model at once.
            masks: For selective types: a mask or its path, a list with one for each checkpoint, or a dict of these by
                spec string.
            backend: As in ``build_projector``.
            cache_device: Where the training features are kept, ``n_checkpoints * n_train * k`` values per spec; None
                for the device of the computation.
            parameters: ``parameters(name, parameter) -> bool`` keeps some of the trainable weights.
            buffer_bytes: Gradient rows collected before projecting; see ``project_loader``.
            dtype: Of the cached features: float32, float64 (gradients too) or bfloat16 (half the memory).
            progress: Shows a bar for walks that last more than 3 s.
            gradients: "full" computes all coordinates, "masked" only those that masks keep (all specs must begin with
                one); "auto" is "masked" where that is possible, with the same scores to rounding. A model for which it
                turns out otherwise in the first batch gets whole gradients, and a warning is logged.

        Raises:
            UsageError: If a spec, a checkpoint or another argument does not fit the model.
        """
        if dtype not in FEATURE_DTYPES:
            raise UsageError(f"dtype is {dtype}; expected one of {', '.join(map(str, FEATURE_DTYPES))}.")
        check_seed(seed)
        pair = specs is None
        self.specs = _parse_specs(specs, sparsification, projection)
        refuse_unused_masks(self.specs, masks)
        self.seed = seed
        self.timings: dict[str, Any] = {}
        self._single = pair
        self._masks = masks
        self._backend = backend
        self._dtype = dtype
        self._buffer_bytes = buffer_bytes
        self._progress = progress
        self._gradients = PerSampleGradients(
            model,
            output,
            micro_batch=micro_batch,
            parameters=parameters,
            device=device,
            dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        )
        self.device = self._gradients.device
        self.cache_device = self.device if cache_device is None else usable_device(cache_device)
        self._checkpoints = _check_checkpoints(model, checkpoints)
        # A spec that does not fit the model fails here, not after minutes of training data.
        projectors = self._build_projectors(0)
        self._route = GradientRoute(self._gradients, gradients, projectors, backend)
        self.gradients = self._route.kind
        suffix = "+masked" if self.gradients == "masked" else ""
        self.backends = {name: projector.backend + suffix for name, projector in projectors.items()}
        self._train: list[dict[str, Tensor]] = []
        self._train_values: list[Tensor] = []

    @property
    def p(self) -> int:
        """Number of weights that are differentiated."""
        return self._gradients.p

    @property
    def gradients_reason(self) -> str:
        """Why gradients are "masked" or "full", and of how many weights whole gradients are formed nevertheless."""
        return self._route.reason

    @property
    def n_checkpoints(self) -> int:
        """Number of checkpoints in the ensemble."""
        return len(self._checkpoints)

    @property
    def n_train(self) -> int:
        """Number of cached training samples; 0 before :meth:`cache`."""
        return len(self._train_values[0]) if self._train_values else 0

    @property
    def model_calls(self) -> int:
        """How often the model has been run so far: micro-batches times checkpoints."""
        return self._route.model_calls

    def cache(self, train_loader: Iterable[Batch]) -> None:
        """Computes and keeps the features of the training set, one gradient pass per checkpoint.

        Args:
            train_loader: Yields batches in the same order every time; it is walked once per checkpoint.

        Raises:
            UsageError: If the loader is empty, shuffles, or yields another number of samples on a later walk.
            GrassError: If a gradient is not finite.
        """
        timings, train, values = PassTimings(), [], []
        before: dict[str, float] = {}
        by_checkpoint: dict[str, list[float]] = {str(spec): [] for spec in self.specs}
        with self._bar(train_loader, "training gradients", 1) as bar:
            for _, features, found in self._walk(train_loader, bar, timings, self.cache_device):
                train.append(features)
                values.append(found)
                for name, seconds in timings.projection.items():
                    by_checkpoint[name].append(seconds - before.get(name, 0.0))
                before = dict(timings.projection)
        self._train, self._train_values = train, values
        self.timings = {
            "gradients": timings.gradients,
            "projection": dict(timings.projection),
            "projection_by_checkpoint": by_checkpoint,
        }

    def _bar(self, loader: Iterable[Batch], description: str, parts: int) -> tqdm:
        """A bar over samples, each counted once per checkpoint and part of the work."""
        expected = sample_count(loader)
        total = None if expected is None else expected * self.n_checkpoints * parts
        return progress_bar(total, description, self._progress)

    def _walk(
        self, loader: Iterable[Batch], bar: tqdm, timings: PassTimings, place: torch.device
    ) -> Iterator[tuple[int, dict[str, Tensor], Tensor]]:
        """Yields ``(checkpoint, {spec: features (n, k)}, values (n,))`` for each checkpoint."""
        check_order(loader)
        first, watched = None, WatchedLoader(loader)
        for index, checkpoint in enumerate(self._checkpoints):
            rows, projectors = self._route.prepared(self._build_projectors(index, timings))
            try:
                features, values = project_loader(
                    rows,
                    load_checkpoint(checkpoint),
                    watched,
                    projectors,
                    buffer_bytes=self._buffer_bytes,
                    store_device=place,
                    progress=bar,
                    timings=timings,
                )
            except UsageError as error:
                if first is None or watched.yielded:
                    raise
                raise UsageError(
                    f"The loader yielded nothing on its walk for checkpoint {index}, and {first} samples on the one "
                    "before; expected what can be walked over again (a DataLoader or a list, not a generator)."
                ) from error
            first = len(values) if first is None else first
            if len(values) != first:
                raise UsageError(
                    f"The loader yielded {len(values)} samples for checkpoint {index} and {first} for checkpoint 0; "
                    "expected the same samples in the same order on every walk (a DataLoader, not a generator)."
                )
            yield index, features, values

    def _build_projectors(self, checkpoint: int, timings: PassTimings | None = None) -> dict[str, Projector]:
        built: dict[str, Projector] = {}
        for spec in self.specs:
            start = clock(self.device)
            built[str(spec)] = build_projector(
                spec,
                self.p,
                seed=self.seed,
                device=self.device,
                dtype=self._dtype,
                backend=self._backend,
                checkpoint=checkpoint,
                mask=self._mask_of(spec, checkpoint),
            )
            if timings is not None:
                timings.add_projection(str(spec), clock(self.device) - start)
        return built

    def _mask_of(self, spec: CompressionSpec, checkpoint: int) -> MaskSource | None:
        if not (spec.sparsification.needs_mask_file or spec.projection.needs_mask_file):
            return None
        choice = self._masks.get(str(spec)) if isinstance(self._masks, Mapping) else self._masks
        if choice is None or isinstance(choice, Mask | str | Path):
            return choice
        if len(choice) != self.n_checkpoints:
            raise UsageError(
                f"masks has {len(choice)} entries for {spec} and there are {self.n_checkpoints} checkpoints; expected "
                "one mask for all of them, or one for each"
            )
        return choice[checkpoint]

    def _require_cache(self) -> None:
        if not self._train:
            raise UsageError("The training features are not there yet; call cache(train_loader) before attribute().")

    def _result(self, scores: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        return scores[str(self.specs[0])] if self._single else scores

    def _add_query_timings(self, timings: PassTimings, scores: dict[str, float]) -> None:
        self.timings["query_gradients"] = timings.gradients
        self.timings["query_projection"] = dict(timings.projection)
        self.timings["scores"] = scores


def _parse_specs(
    specs: Sequence[CompressionSpec | str] | None, sparsification: str, projection: str
) -> tuple[CompressionSpec, ...]:
    if specs is None:
        return _flat((CompressionSpec.parse(sparsification=sparsification, projection=projection),))
    if sparsification != "identity" or projection != "identity":
        raise UsageError("Both specs= and sparsification=/projection= were given; expected one of the two.")
    if isinstance(specs, str | CompressionSpec):
        raise UsageError(f"specs is {str(specs)!r}; expected a list of compression specs, for example ['sjlt-4096'].")
    parsed = _flat(tuple(parse_specs(specs)))
    if not parsed:
        raise UsageError("specs is empty; expected at least one compression spec, for example ['sjlt-4096'].")
    return parsed


def _flat(specs: tuple[CompressionSpec, ...]) -> tuple[CompressionSpec, ...]:
    for spec in specs:
        if spec.is_factored:
            raise SpecError(
                f"{spec} compresses layer by layer, but this attributor works on the gradient of the whole model; "
                f"expected a flat spec, for example {spec.sparsification.family}-{spec.sparsification.k}."
            )
    return specs


def _check_checkpoints(model: nn.Module, checkpoints: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
    if isinstance(checkpoints, str | Path | Mapping):
        raise UsageError(f"checkpoints is one {type(checkpoints).__name__}; expected a list: [checkpoint].")
    if len(checkpoints) == 0:
        raise UsageError("checkpoints is empty; expected at least one state dict or safetensors path.")
    for index, checkpoint in enumerate(checkpoints):
        if not isinstance(checkpoint, str | Path | Mapping):
            raise UsageError(
                f"Checkpoint {index} is a {type(checkpoint).__name__}; expected a state dict or a safetensors path."
            )
        check_fit(model, checkpoint_shapes(checkpoint), f"Checkpoint {index}")
    return tuple(checkpoints)

"""From an experiment's name, or a finished store, to the influence function that fills it and asks it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from grass_lib.errors import StoreError, UsageError
from grass_lib.store.manifest import SOURCE_FIELDS

if TYPE_CHECKING:
    from grass_lib.attribution.influence import InfluenceFunction
    from grass_lib.experiments.base import AttributionTask
    from grass_lib.gradients.maps import LayerMasks
    from grass_lib.ranks import Ranks


@dataclass(frozen=True)
class StoreSource:
    """What a store was, or will be, cached from.

    Attributes:
        experiment: Key of the experiment.
        scale: ``embedded`` or ``paper``.
        parameters: All parameters of the experiment's notebook.
        sparsification: Stage 1.
        projection: Stage 2.
        hessian: ``eFIM`` or ``Identity``.
        seed: Of the random maps.
        dtype: Of the stored rows.
        masks: How the masks of a selective stage 1 are chosen; empty where there are none.
    """

    experiment: str
    scale: str
    parameters: Mapping[str, Any]
    sparsification: str
    projection: str
    hessian: str
    seed: int
    dtype: str
    masks: str = ""

    @classmethod
    def of_store(cls, store: Any) -> StoreSource:
        """Reads it from a store's manifest.

        Raises:
            StoreError: The store was not written by ``grass store cache`` or a notebook of this project.
        """
        source = store.source or {}
        missing = [name for name in SOURCE_FIELDS if name not in source]
        if missing:
            raise StoreError(
                f"the store {store.path} does not say what it was cached from ({', '.join(missing)} missing in its "
                "manifest); stores of `grass store cache` and of notebooks do"
            )
        return cls(**{name: source[name] for name in SOURCE_FIELDS}, masks=source.get("masks") or "")

    def to_json(self) -> dict[str, Any]:
        """For a store's manifest."""
        found = {name: getattr(self, name) for name in SOURCE_FIELDS} | {"parameters": dict(self.parameters)}
        return found | ({"masks": self.masks} if self.masks else {})


def planned_source(
    experiment: str,
    scale: str,
    assignments: Mapping[str, str],
    *,
    sparsification: str,
    projection: str,
    hessian: str,
    seed: int,
    dtype: str,
    masks: str = "",
    here: bool = True,
) -> StoreSource:
    """Checks everything that a user typed, before any model or data is loaded.

    Args:
        experiment: Key of the experiment.
        scale: ``embedded`` or ``paper``.
        assignments: Parameters of its notebook, as text.
        sparsification: Stage 1.
        projection: Stage 2.
        hessian: ``eFIM`` or ``Identity``.
        seed: Of everything random.
        dtype: Of the stored rows.
        masks: How the masks of a selective stage 1 are chosen; empty for ``learned``.
        here: Whether it will be computed on this machine; elsewhere there may be other data and a GPU.

    Raises:
        UsageError: Something cannot work.
    """
    from grass_lib.masks.factored import FACTORED_METHODS
    from grass_lib.project import project_root
    from grass_lib.runner.parameters import read_parameters, resolve
    from grass_lib.runner.planning import check_names, check_scale, experiments_by_name, template_path
    from grass_lib.seeds import check_seed
    from grass_lib.specs import CompressionSpec, parse_hessian
    from grass_lib.store.formats import DTYPES

    check_seed(seed, "--seed")
    (name,) = check_names([experiment])
    found = experiments_by_name()[name]
    if found.attribution_task is None:
        able = [key for key, item in experiments_by_name().items() if item.attribution_task is not None]
        raise UsageError(f"{name} keeps no gradient store; expected one of {', '.join(able)}")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    spec = CompressionSpec.parse(sparsification=sparsification, projection=projection)
    first = spec.sparsification
    if not (first.is_identity or first.is_factored):
        raise UsageError(
            f"--sparsification is {first}, which is flat; expected a factored one such as {first.family}-16*16, or "
            "identity"
        )
    spec.check_shorter()
    selective = first.needs_mask_file
    if masks and not selective:
        raise UsageError(f"--masks is for selective masks, and {spec} has none; leave it out")
    if masks and masks not in FACTORED_METHODS:
        raise UsageError(f"--masks is {masks!r}; expected one of {', '.join(FACTORED_METHODS)}")
    parameters = resolve(read_parameters(template_path(project_root(), found)), assignments, experiment=name)
    if "seed" in parameters:
        parameters["seed"] = seed
    check_scale(scale)
    if found.validate is not None:
        found.validate(scale, parameters)
    problems = found.check(scale) if here else []
    if problems:
        raise UsageError(f"{name}, scale {scale}: {'; '.join(problems)}")
    return StoreSource(
        experiment=name,
        scale=scale,
        parameters=parameters,
        sparsification=str(spec.sparsification),
        projection=str(spec.projection),
        hessian=parse_hessian(hessian),
        seed=seed,
        dtype=dtype,
        masks=(masks or "learned") if selective else "",
    )


def check_folder(source: StoreSource, store: Path) -> None:
    """Refuses a folder that holds something else, before a model is loaded or trained for it.

    Args:
        source: What is to be cached.
        store: The folder.

    Raises:
        UsageError: It is a file.
        StoreError: It holds a store with other settings.
    """
    from grass_lib.store import GradientStore
    from grass_lib.store.store import MANIFEST

    if store.exists() and not store.is_dir():
        raise UsageError(f"--store is {str(store)!r}, which is a file; expected a folder")
    if not (store / MANIFEST).is_file():
        return
    there = GradientStore.open(store).source or {}
    own = source.to_json()
    # Curvature is none of the rows; parameters are compared with everything else once the rows are known.
    names = [name for name in (*SOURCE_FIELDS, "masks") if name not in ("parameters", "hessian")]
    other = [name for name in names if name in there and there[name] != own.get(name)]
    if other:
        had = "; ".join(f"{name} is {there[name]} there, {own.get(name)} here" for name in other)
        raise StoreError(f"{store} holds a store of something else: {had}; give the same settings, or another folder")


def influence_of(
    source: StoreSource,
    store: Path,
    *,
    shard_size: int | None = None,
    device: str = "auto",
    ranks: Ranks | None = None,
    progress: bool = True,
) -> tuple[AttributionTask, InfluenceFunction]:
    """The experiment's task, and the influence function on a store of it.

    Args:
        source: What the store is cached from.
        store: Its folder.
        shard_size: Samples in a shard of a store to be made.
        device: ``auto``, ``cpu`` or ``cuda``.
        ranks: Processes that share the work; what is trained or fitted first is so by the first of them.
        progress: Whether bars are shown.

    Raises:
        UsageError: The device or the experiment is not usable here.
        StoreError: The folder holds something else.
    """
    from grass_lib.attribution.influence import InfluenceFunction
    from grass_lib.experiments.base import resolve_device
    from grass_lib.experiments.layer_masks import fit_layer_masks, masks_folder
    from grass_lib.ranks import Ranks
    from grass_lib.runner.planning import experiments_by_name
    from grass_lib.specs import CompressionSpec
    from grass_lib.store.lock import creation_lock

    build = experiments_by_name()[source.experiment].attribution_task
    if build is None:
        raise UsageError(f"{source.experiment} keeps no gradient store")
    spec = CompressionSpec.parse(sparsification=source.sparsification, projection=source.projection)
    together = Ranks() if ranks is None else ranks
    shown = progress and together.rank == 0
    if shown:
        typer.echo(f"loading model and data of {source.experiment} ...", err=True)

    def prepare() -> tuple[AttributionTask, LayerMasks | None]:
        # Workers that start together: the first trains and fits, the others read what it wrote.
        folder = masks_folder(source.experiment, source.scale)
        if not spec.sparsification.needs_mask_file:
            return build(source.scale, source.parameters, resolve_device(device), progress=shown), None
        folder.mkdir(parents=True, exist_ok=True)
        with creation_lock(folder):
            return prepare_alone(folder)

    def prepare_alone(folder: Path) -> tuple[AttributionTask, LayerMasks | None]:
        task = build(source.scale, source.parameters, resolve_device(device), progress=shown)
        fitted = fit_layer_masks(
            task.model,
            task.loss,
            task.train,
            [spec],
            folder,
            layers=task.layers,
            include_head=task.include_head,
            data_sha256=task.data_sha256,
            scale=source.scale,
            method=source.masks or "learned",
            seed=source.seed,
            progress=shown,
        )
        return task, fitted[spec.sparsification].masks if fitted else None

    task, masks = together.first(prepare)
    influence = InfluenceFunction(
        task.model,
        task.loss,
        target=task.target,
        layers=task.layers,
        include_head=task.include_head,
        sparsification=source.sparsification,
        projection=source.projection,
        hessian=source.hessian,
        store=store,
        dtype=source.dtype,
        masks=masks,
        seed=source.seed,
        shard_size=shard_size,
        fingerprint={"data": task.data_sha256},
        source=source.to_json(),
        ranks=together,
        progress=progress,
        fp8=task.fp8,
    )
    return task, influence

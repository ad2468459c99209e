"""From an experiment's name to masks fitted on its trained model, with the facts that a report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass_lib.errors import UsageError

if TYPE_CHECKING:
    from grass_lib.experiments.base import AttributionTask
    from grass_lib.projection import Mask
    from grass_lib.specs import StageSpec

FLAT = ("mlp_mnist",)
"""Experiments that compress whole gradients; the others with an attribution task compress layer by layer."""
MAX_QUERIES = 512
"""Most queries that held-out correlations of a flat mask are taken over."""
RECIPES = ("default", "paper")


@dataclass(frozen=True)
class MaskRequest:
    """What a user asked for, checked before any model or data is loaded.

    Attributes:
        experiment: Key of the experiment.
        scale: ``embedded`` or ``paper``.
        parameters: All parameters of the experiment's notebook.
        stage: ``selective_mask-K`` or ``selective_mask-K*K``.
        method: How coordinates are chosen.
        recipe: One of `RECIPES`, for ``learned``.
        seed: Of everything random.
    """

    experiment: str
    scale: str
    parameters: Mapping[str, Any]
    stage: StageSpec
    method: str
    recipe: str
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        """Options of the method."""
        return {"recipe": "paper"} if self.recipe == "paper" else {}

    @property
    def default_file(self) -> Path:
        """Where the masks go unless the user says otherwise."""
        from grass_lib.project import runs_root
        from grass_lib.runner.parameters import parameter_hash

        recipe = "-paper" if self.recipe == "paper" else ""
        size = "x".join(map(str, self.stage.dims))
        digest = parameter_hash(self.parameters)
        return (
            runs_root() / "masks" / f"{self.experiment}-{self.scale}-{self.method}{recipe}-{size}-{digest}.safetensors"
        )


def planned_masks(
    experiment: str,
    scale: str,
    assignments: Mapping[str, str],
    *,
    k: str,
    method: str,
    recipe: str = "default",
    seed: int = 0,
) -> MaskRequest:
    """Checks everything that a user typed.

    Args:
        experiment: Key of the experiment.
        scale: ``embedded`` or ``paper``.
        assignments: Parameters of its notebook, as text.
        k: ``256``, or ``16*16`` for layers.
        method: How coordinates are chosen.
        recipe: One of `RECIPES`.
        seed: Of everything random.

    Raises:
        UsageError: Something cannot work.
    """
    from grass_lib.project import project_root
    from grass_lib.runner.parameters import read_parameters, resolve
    from grass_lib.runner.planning import check_names, check_scale, experiments_by_name, template_path
    from grass_lib.seeds import check_seed
    from grass_lib.specs import StageSpec

    check_seed(seed, "--seed")
    (name,) = check_names([experiment])
    found = experiments_by_name()[name]
    able = [key for key, item in experiments_by_name().items() if key in FLAT or item.attribution_task is not None]
    if name not in able:
        raise UsageError(f"{name} has no model to fit masks on; expected one of {', '.join(able)}")
    stage = StageSpec.parse(f"selective_mask-{k.strip()}")
    flat = name in FLAT
    if stage.is_factored == flat:
        form = "K, such as 256: it compresses whole gradients" if flat else "K*K, such as 16*16: it compresses layers"
        raise UsageError(f"--k is {k!r}; expected for {name} the form {form}")
    methods = ("random", "energy", "leverage", "learned") if flat else ("random", "energy", "learned")
    if method not in methods:
        raise UsageError(f"--method is {method!r}; expected for {name} one of {', '.join(methods)}")
    if recipe not in RECIPES:
        raise UsageError(f"--recipe is {recipe!r}; expected one of {', '.join(RECIPES)}")
    if recipe != "default" and method != "learned":
        raise UsageError(f"--recipe is for --method learned, and the method is {method}; leave it out")
    parameters = resolve(read_parameters(template_path(project_root(), found)), assignments, experiment=name)
    if "seed" in parameters:
        parameters["seed"] = seed
    check_scale(scale)
    if found.validate is not None:
        found.validate(scale, parameters)
    problems = found.check(scale)
    if problems:
        raise UsageError(f"{name}, scale {scale}: {'; '.join(problems)}")
    return MaskRequest(name, scale, parameters, stage, method, recipe, seed)


@dataclass(frozen=True, eq=False)
class Fitted:
    """Masks and whether they were there already.

    Attributes:
        masks: By side, or one flat mask under the empty name.
        reused: Whether a finished file held them.
        layers: Sizes of the parts that the report counts kept coordinates of: ``{layer: size}``.
    """

    masks: Mapping[str, Mask]
    reused: bool
    layers: Mapping[str, int]


def fit_masks(request: MaskRequest, file: Path, *, device: str = "auto", progress: bool = True) -> Fitted:
    """Fits the masks of a request and writes them, or reads a finished file of the same request.

    Args:
        request: What is wanted.
        file: Where they go.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: Whether bars are shown.

    Raises:
        UsageError: The device is not usable, the file holds something else, or the gradients cannot be used.
    """
    from grass_lib.experiments.base import resolve_device
    from grass_lib.runner.planning import experiments_by_name

    place = resolve_device(device)
    if request.experiment in FLAT:
        return _fit_flat(request, file, place, progress)
    build = experiments_by_name()[request.experiment].attribution_task
    if build is None:
        raise UsageError(f"{request.experiment} has no model to fit masks on")
    return _fit_layers(request, build(request.scale, request.parameters, place, progress=progress), file, progress)


def _given(request: MaskRequest, model: str, data: str) -> dict[str, str]:
    return {"experiment": request.experiment, "scale": request.scale, "model": model, "data": data}


def _fit_layers(request: MaskRequest, task: AttributionTask, file: Path, progress: bool) -> Fitted:
    from grass_lib.attribution.origin import model_sha256
    from grass_lib.experiments.layer_masks import RANKS
    from grass_lib.gradients.layers import find_layers
    from grass_lib.masks.stages import fit_stages

    shapes = find_layers(task.model, task.layers, include_head=task.include_head)
    sizes = {f"{name}/output": shape.d_out for name, shape in shapes.items()}
    sizes |= {f"{name}/input": shape.d_in for name, shape in shapes.items()}
    found = fit_stages(
        task.model,
        task.loss,
        task.train,
        {request.stage: file},
        layers=task.layers,
        include_head=task.include_head,
        method=request.method,
        recipe=request.recipe,
        seed=request.seed,
        rank=RANKS[request.scale],
        provenance=_given(request, model_sha256(task.model), task.data_sha256),
        progress=progress,
    )[request.stage]
    return Fitted(found.masks, found.reused, sizes)


def _fit_flat(request: MaskRequest, file: Path, device: str, progress: bool) -> Fitted:
    from grass_lib.attribution.origin import model_sha256
    from grass_lib.experiments import mlp_mnist
    from grass_lib.gradients import PerSampleGradients, margin
    from grass_lib.masks import GradientSource, fit, hard_mask_correlation
    from grass_lib.masks.factored import with_facts
    from grass_lib.masks.overlap import overlap
    from grass_lib.masks.uniform import fit_random
    from grass_lib.project import runs_root
    from grass_lib.projection import Mask

    parameters, seed = request.parameters, request.seed
    protocol = mlp_mnist.protocol(request.scale, n_lds=parameters["n_lds_models"], n_trak=parameters["n_trak_models"])
    data, model = mlp_mnist.load_data(request.scale), mlp_mnist.make_model()
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    (k,), p = request.stage.dims, sum(sizes.values())
    request.stage.check_input(p)
    networks = runs_root() / "shared" / f"{request.experiment}-{request.scale}-networks"
    networks.mkdir(parents=True, exist_ok=True)
    checkpoints = mlp_mnist.trak_checkpoints(protocol, data, networks, seed=seed, device=device, progress=progress)
    model.load_state_dict(checkpoints[0])
    model.to(device)
    given = {
        **_given(request, model_sha256(model), data.sha256),
        "recipe": request.recipe,
        "spec": str(request.stage),
    }
    if file.exists():
        mask = Mask.load(file)
        mask.check(k, p, {**given, "method": request.method, "seed": str(seed)})
        return Fitted({"": mask}, True, sizes)
    gradients = PerSampleGradients(model, margin)
    source = GradientSource.from_model(gradients, mlp_mnist.batches(data.train_x, data.train_y))
    mask = fit(
        source,
        k,
        method=request.method,
        seed=seed,
        provenance=given,
        progress=progress,
        **request.options,
    )
    n_query = min(MAX_QUERIES, len(data.query_y))
    queries = GradientSource.from_model(gradients, mlp_mnist.batches(data.query_x[:n_query], data.query_y[:n_query]))
    by_energy = mask if request.method == "energy" else fit(source, k, method="energy")
    others = {"energy": by_energy.indices, "random": fit_random(p, k, seed=seed)}
    facts = {"query_correlation": f"{hard_mask_correlation(source, queries, mask.indices)[0]:.6f}"}
    for name, indices in others.items():
        facts[f"{name}_query_correlation"] = f"{hard_mask_correlation(source, queries, indices)[0]:.6f}"
        facts[f"overlap_{name}"] = f"{overlap(mask.indices, indices):.6f}"
    mask = with_facts(mask, facts)
    mask.save(file)
    return Fitted({"": mask}, False, sizes)

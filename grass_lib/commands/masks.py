"""The command ``grass masks``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grass_lib.errors import UsageError

if TYPE_CHECKING:
    from grass_lib.commands.mask_tasks import Fitted, MaskRequest


def masks(
    experiment: Annotated[str, typer.Argument(metavar="EXPERIMENT", help="Such as gpt2_wikitext.")],
    k: Annotated[str, typer.Option("--k", metavar="K|K*K", help="Kept coordinates: 256, or 16*16 for layers.")],
    method: Annotated[str, typer.Option(help="random, energy, leverage (whole gradients only) or learned")] = "learned",
    recipe: Annotated[
        str, typer.Option(help="Of learned: default, or paper for the paper's own schedule.")
    ] = "default",
    scale: Annotated[str, typer.Option(help="embedded or paper")] = "embedded",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The mask file; below runs/masks/ without.")
    ] = None,
    parameters: Annotated[
        list[str] | None, typer.Option("-p", "--parameter", metavar="NAME=VALUE", help="A parameter of the notebook.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress bars.")] = False,
) -> None:
    """Choose the gradient coordinates to keep, on an experiment's trained model, and say what was kept.

    A finished mask file of the same model, data and settings is used again.
    """
    from grass_lib.cli_output import near
    from grass_lib.commands.mask_tasks import fit_masks, planned_masks
    from grass_lib.runner.parameters import split_assignments

    request = planned_masks(
        experiment, scale, split_assignments(parameters or ()), k=k, method=method, recipe=recipe, seed=seed
    )
    file = request.default_file if out is None else out
    if out is None:
        file.parent.mkdir(parents=True, exist_ok=True)
    elif not out.resolve().parent.is_dir():
        raise UsageError(f"--out is {str(out)!r}, whose folder does not exist; make it first")
    elif out.is_dir():
        raise UsageError(f"--out is {str(out)!r}, which is a folder; expected a file")
    fitted = fit_masks(request, file, device=device, progress=not quiet)
    if fitted.reused:
        typer.echo(f"{near(file)} is finished and of the same model, data and settings: used again")
    else:
        typer.echo(f"written to {near(file)}")
    for line in report(request, fitted):
        typer.echo(line)


def report(request: MaskRequest, fitted: Fitted) -> list[str]:
    """What was kept, in lines: shares per layer, overlap with other masks, correlations on held-out pairs.

    Args:
        request: What was asked for.
        fitted: The masks, whose provenance has the figures.
    """
    if "" in fitted.masks:
        return _flat(request, fitted)
    lines = [f"{request.stage}, {request.method}: {len(fitted.masks) // 2} layers"]
    lines.append(f"{'kept':<44} {'share':>7} {'as energy':>10} {'as random':>10}")
    for key, mask in fitted.masks.items():
        facts = mask.provenance
        shares = (
            f"{mask.k / mask.p:>7.1%} {float(facts['overlap_energy']):>10.1%} {float(facts['overlap_random']):>10.1%}"
        )
        lines.append(f"{f'{key}: {mask.k:,} of {mask.p:,}':<44} {shares}")
    lines.append("rank correlation with the full inner products, held-out pairs of training samples:")
    names = _compared(request, "held_out_correlation", "{}_correlation")
    lines.append(f"{'layer':<44} " + " ".join(f"{name:>10}" for name in names))
    rows = []
    for key, mask in fitted.masks.items():
        layer, _, side = key.rpartition("/")
        if side == "output":  # the figures are of both sides together
            rows.append([float(mask.provenance[entry]) for entry in names.values()])
            lines.append(f"{layer:<44} " + " ".join(f"{value:>10.3f}" for value in rows[-1]))
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    lines.append(f"{'mean':<44} " + " ".join(f"{value:>10.3f}" for value in means))
    least = min(float(mask.provenance["kept_energy"]) for mask in fitted.masks.values())
    lines.append(
        f"(the full products are of low-rank factors, which hold at least {least:.1%} of the squared gradients)"
    )
    return lines


def _flat(request: MaskRequest, fitted: Fitted) -> list[str]:
    mask, start = fitted.masks[""], 0
    facts = mask.provenance
    lines = [f"{request.stage}, {request.method}: {mask.k:,} of {mask.p:,} coordinates ({mask.k / mask.p:.2%})"]
    for name, size in fitted.layers.items():
        count = int(((mask.indices >= start) & (mask.indices < start + size)).sum())
        lines.append(f"  {name:<24} {count:>7,} of {size:>9,} ({count / size:.2%}), {count / mask.k:.1%} of those kept")
        start += size
    by_energy, at_random = float(facts["overlap_energy"]), float(facts["overlap_random"])
    lines.append(f"also kept by energy: {by_energy:.1%}; by a random mask: {at_random:.1%}")
    names = _compared(request, "query_correlation", "{}_query_correlation")
    values = ", ".join(f"{name} {float(facts[entry]):.3f}" for name, entry in names.items())
    lines.append(f"rank correlation with the full inner products of queries and training samples: {values}")
    return lines


def _compared(request: MaskRequest, own: str, other: str) -> dict[str, str]:
    """Entries of the provenance by method, the one asked for first, each once."""
    return {
        request.method: own,
        **{name: other.format(name) for name in ("energy", "random") if name != request.method},
    }

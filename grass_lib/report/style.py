"""How the report looks: one colour and one marker for each method, in every figure and table.

The colours start from the palette of Okabe and Ito. Each keeps a contrast of at least 2.7 against white and against the
dark page, and any two stay apart for readers with protanopia, deuteranopia or tritanopia (a test simulates all three);
the marker is a second cue that needs no colour at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

#: Grey of text and axes: the same contrast (4.3) on a white page and on a dark one.
NEUTRAL = "#7a7a7a"
GRID = "#7a7a7a40"
#: Size of markers (points).
MARKER = 7.0


@dataclass(frozen=True)
class MethodStyle:
    """What identifies one method in a figure.

    Attributes:
        label: name shown in legends and tables.
        colour: hexadecimal colour.
        marker: matplotlib marker.
        symbol: the same marker in plotly's vocabulary.
    """

    label: str
    colour: str
    marker: str
    symbol: str


METHODS: dict[str, MethodStyle] = {
    "random_mask": MethodStyle("random mask", "#D98C00", "o", "circle"),
    "selective_mask": MethodStyle("selective mask", "#8F5A00", "s", "square"),
    "sjlt": MethodStyle("SJLT", "#0072B2", "D", "diamond"),
    "fjlt": MethodStyle("FJLT", "#009E73", "^", "triangle-up"),
    "normal": MethodStyle("dense normal", "#CC79A7", "v", "triangle-down"),
    "rademacher": MethodStyle("dense Rademacher", "#4AA3E0", "P", "cross"),
    "grass": MethodStyle("GraSS", "#D55E00", "*", "star"),
    "selective_grass": MethodStyle("selective GraSS", "#9A3FA0", "X", "x"),
    "masked_normal": MethodStyle("random mask + normal", "#7B68EE", "h", "hexagon"),
    "selective_masked_normal": MethodStyle("selective mask + normal", "#8400FC", "<", "triangle-left"),
    "identity": MethodStyle("no projection", NEUTRAL, "d", "diamond-tall"),
}

#: Names of methods whose factored form has a name of its own; colour and marker stay.
FACTORED_LABELS: dict[str, str] = {
    "normal": "LoGra (normal)",
    "grass": "FactGraSS",
    "selective_grass": "selective FactGraSS",
}

METHOD_COLOURS: dict[str, str] = {name: style.colour for name, style in METHODS.items()}


@dataclass(frozen=True)
class PhaseStyle:
    """What identifies one phase of a run in the time split.

    Attributes:
        label: name shown in legends and tables.
        colour: hexadecimal colour.
        hatch: matplotlib hatch, a second cue that needs no colour.
    """

    label: str
    colour: str
    hatch: str


#: Phases of influence functions in the order of the work.
PHASES: dict[str, PhaseStyle] = {
    "gradients": PhaseStyle("forward/backward", NEUTRAL, ""),
    "compression": PhaseStyle("compression", "#D55E00", "///"),
    "writing": PhaseStyle("writing", "#4AA3E0", "..."),
    "curvature": PhaseStyle("curvature", "#8F5A00", "xxx"),
    "scoring": PhaseStyle("scoring", "#009E73", "\\\\\\"),
}

#: Ways to choose the coordinates of a mask; colours and markers of the palette above.
MASK_WAYS: dict[str, MethodStyle] = {
    "random": MethodStyle("random", "#D98C00", "o", "circle"),
    "energy": MethodStyle("energy", "#0072B2", "D", "diamond"),
    "leverage": MethodStyle("leverage", "#009E73", "^", "triangle-up"),
    "learned": MethodStyle("learned", "#9A3FA0", "X", "x"),
    "learned (paper)": MethodStyle("learned, the paper's schedule", "#D55E00", "v", "triangle-down"),
}

EXPERIMENT_TITLES: dict[str, str] = {
    "mlp_mnist": "MLP + MNIST",
    "resnet9_cifar2": "ResNet-9 + CIFAR-2",
    "musictransformer_maestro": "Music Transformer + MAESTRO",
    "gpt2_wikitext": "GPT-2 small + WikiText-2",
    "mlp_masks": "Which coordinates matter? MLP + MNIST",
    "logix_comparison": "Other systems on the same work",
    "llama3_openwebtext": "Llama-3.1-8B + OpenWebText",
}

ATTRIBUTOR_TITLES: dict[str, str] = {
    "trak": "TRAK",
    "tracin": "TracIn",
    "gradient_cosine": "gradient cosine",
    "influence_efim": "influence function, eFIM",
    "influence_identity": "influence function, identity",
    "logix": "LogIX",
    "dattri": "dattri",
    "bergson": "bergson",
    "kronfluence": "kronfluence",
}


def _family(stage: str) -> str:
    """Type of a stage string without its numbers: ``sjlt_4-2048`` gives ``sjlt``."""
    name = stage.strip().split("-", 1)[0]
    for base in ("selective_grass", "grass", "sjlt"):
        if name == base or name.startswith(f"{base}_"):
            return base
    return name


def method_of(sparsification: str, projection: str) -> str:
    """Names the method of a pair of stages, the key of `METHODS`.

    A mask before SJLT is GraSS whatever the mask's size (factored pairs, FactGraSS, share its colour); a lone stage
    keeps its own name, factored or not.

    Args:
        sparsification: first stage as typed, such as ``random_mask-32768`` or ``identity``.
        projection: second stage as typed, such as ``sjlt-4096``.

    Returns:
        A key of `METHODS`; ``identity`` for a type that has no style of its own.
    """
    first, second = _family(sparsification), _family(projection)
    chosen = "selective_" if first == "selective_mask" else ""
    if second == "identity":
        method = first
    elif first == "identity":
        method = second
    elif second == "sjlt":
        method = f"{chosen}grass"
    elif first in ("random_mask", "selective_mask"):
        method = f"{chosen}masked_normal"
    else:
        method = second
    return method if method in METHODS else "identity"


def is_factored(sparsification: str) -> bool:
    """Whether a first stage acts on both sides of a layer, as ``normal-64*64`` does; k then counts per layer."""
    return "*" in sparsification


def reference_method(sparsification: str) -> str:
    """The method whose time is 1 in tables: LoGra's dense factors for factored compressions, SJLT for flat ones.

    Args:
        sparsification: first stage as typed.

    Returns:
        A key of `METHODS`.
    """
    return "normal" if is_factored(sparsification) else "sjlt"


def method_label(sparsification: str, projection: str) -> str:
    """Name shown to readers for a pair of stages, FactGraSS and LoGra included.

    Args:
        sparsification: first stage as typed.
        projection: second stage as typed.

    Returns:
        For example ``SJLT``, ``GraSS`` or ``LoGra (normal)``.
    """
    method = method_of(sparsification, projection)
    names = FACTORED_LABELS if is_factored(sparsification) else {}
    return names.get(method, METHODS[method].label)


def stage_text(sparsification: str, projection: str) -> str:
    """The pair as it is typed on the command line, identity stages left out.

    Args:
        sparsification: first stage.
        projection: second stage.

    Returns:
        ``random_mask-32768->sjlt-2048``, ``sjlt-2048`` or ``normal-64*64``.
    """
    parts = [part for part in (sparsification, projection) if part != "identity"]
    return "->".join(parts) if parts else "identity"


def experiment_title(name: str) -> str:
    """Title of a model and data pair; an unknown name is returned as it is."""
    return EXPERIMENT_TITLES.get(name, name)


@contextmanager
def figure_style() -> Iterator[None]:
    """Matplotlib settings of the report, undone on exit.

    Backgrounds are transparent and text is mid-grey, so that one file serves light and dark pages; ids and dates
    that would change from run to run are fixed, so that redrawing gives the same bytes.
    """
    import matplotlib as mpl
    import seaborn as sns

    settings: dict[Any, Any] = {
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "savefig.transparent": True,
        "text.color": NEUTRAL,
        "axes.labelcolor": NEUTRAL,
        "axes.titlecolor": NEUTRAL,
        "axes.edgecolor": NEUTRAL,
        "xtick.color": NEUTRAL,
        "ytick.color": NEUTRAL,
        "grid.color": GRID,
        "legend.labelcolor": NEUTRAL,
        "legend.frameon": False,
        "font.size": 10.5,
        "axes.titlesize": 11.5,
        "axes.titleweight": "bold",
        "lines.linewidth": 2.0,
        "lines.markersize": MARKER,
        "figure.dpi": 110,
        "svg.hashsalt": "grass_lib",
        "svg.fonttype": "path",
        "pdf.compression": 6,
    }
    with mpl.rc_context(), sns.axes_style("whitegrid"):
        mpl.rcParams.update(settings)
        yield

"""The systems and their options; nothing of them is imported here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from grass_lib.errors import UsageError
from grass_lib.specs import CompressionSpec, parse_hessian


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


@dataclass(frozen=True)
class Options:
    """What all systems take.

    Attributes:
        dampings: Relative to the mean eigenvalue of each layer's curvature; empty for the library's own default.
        keep_matrices: Whether the projection matrices come back.
        few: Work on the first so many training sequences, and as many queries at most; 0 for all.
    """

    dampings: tuple[float, ...] = ()
    keep_matrices: bool = False
    few: int = 0
    system: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if any(not 0.0 < value < math.inf for value in self.dampings):
            raise UsageError(f"dampings is {self.dampings}; expected finite numbers above 0")
        if self.few < 0:
            raise UsageError(f"few is {self.few}; expected 0 (all) or a number of sequences")
        self.check()

    def check(self) -> None:
        """Raises UsageError where an option does not fit."""

    @property
    def label(self) -> str:
        """The system with its options, for tables."""
        return SYSTEMS[self.system].title

    def to_json(self) -> dict[str, Any]:
        """All options as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class LogIXOptions(Options):
    """LogIX through its core API.

    Attributes:
        rank: Of the encoder and decoder on both sides; a layer's gradient has ``rank^2`` features.
        init: ``random`` or ``pca``.
        hessian: ``raw`` (what others call eFIM), ``kfac``, ``ekfac`` or ``none``.
        log_dtype: Type that gradients are logged in; ``none`` for that of the model.
    """

    rank: int = 64
    init: str = "random"
    hessian: str = "raw"
    log_dtype: str = "none"
    system: ClassVar[str] = "logix"

    def check(self) -> None:
        """Raises UsageError where an option does not fit."""
        _choose("init", self.init, ("random", "pca"))
        _choose("hessian", self.hessian, ("raw", "kfac", "ekfac", "none"))
        _choose("log_dtype", self.log_dtype, ("none", "float32", "float16"))
        if self.rank < 1:
            raise UsageError(f"rank is {self.rank}; expected 1 or more")

    @property
    def label(self) -> str:
        """The system with its options, for tables."""
        return f"LogIX {self.init}-{self.rank}, {self.hessian}"


@dataclass(frozen=True)
class DattriOptions(Options):
    """dattri's attributors.

    Attributes:
        method: ``logra``, ``factgrass`` or ``trak``.
        k: Compressed size of a layer (of the whole gradient for trak, 0 for no projection).
        hessian: ``eFIM`` or ``Identity`` (trak has none).
        offload: Where gradients are kept: ``none``, ``cpu`` or ``disk``.
        layer: For trak: the parameters whose gradient is taken, names with commas; empty for all.
    """

    method: str = "logra"
    k: int = 4096
    hessian: str = "eFIM"
    offload: str = "cpu"
    layer: str = ""
    system: ClassVar[str] = "dattri"

    def check(self) -> None:
        """Raises UsageError where an option does not fit."""
        _choose("method", self.method, ("logra", "factgrass", "trak"))
        _choose("offload", self.offload, ("none", "cpu", "disk"))
        parse_hessian(self.hessian)
        if self.k < (self.method != "trak"):
            raise UsageError(f"k is {self.k}; expected 1 or more (0 for trak without a projection)")

    @property
    def label(self) -> str:
        """The system with its options, for tables."""
        name = {"logra": "LoGra", "factgrass": "FactGraSS", "trak": "TRAK"}[self.method]
        curvature = "" if self.method == "trak" else f", {self.hessian}"
        return f"dattri {name}-{self.k or 'identity'}{curvature}"


@dataclass(frozen=True)
class BergsonOptions(Options):
    """bergson's index of gradients and its scorer.

    Attributes:
        side: Projected size of each side of a layer; a layer's gradient has ``side^2`` features. 0 for no projection.
        projection_type: ``rademacher`` or ``normal``.
        include_bias: Whether gradients of biases are a column of the layer's gradient.
        hessian: ``autocorrelation`` (what others call eFIM) or ``none``.
    """

    side: int = 16
    projection_type: str = "rademacher"
    include_bias: bool = False
    hessian: str = "autocorrelation"
    system: ClassVar[str] = "bergson"

    def check(self) -> None:
        """Raises UsageError where an option does not fit."""
        _choose("projection_type", self.projection_type, ("rademacher", "normal"))
        _choose("hessian", self.hessian, ("autocorrelation", "none"))
        if self.side < 0:
            raise UsageError(f"side is {self.side}; expected 0 (no projection) or more")

    @property
    def label(self) -> str:
        """The system with its options, for tables."""
        projection = f"{self.projection_type}-{self.side}*{self.side}" if self.side else "unprojected"
        return f"bergson {projection}, {self.hessian}"


@dataclass(frozen=True)
class KronfluenceOptions(Options):
    """kronfluence's factors and pairwise scores on whole gradients.

    Attributes:
        strategy: ``ekfac``, ``kfac``, ``diagonal`` or ``identity``.
        empirical: Whether curvature comes from the data's own labels; the library's default is sampled ones.
    """

    strategy: str = "ekfac"
    empirical: bool = True
    system: ClassVar[str] = "kronfluence"

    def check(self) -> None:
        """Raises UsageError where an option does not fit."""
        _choose("strategy", self.strategy, ("ekfac", "kfac", "diagonal", "identity"))

    @property
    def label(self) -> str:
        """The system with its options, for tables."""
        fisher = "" if self.strategy == "identity" else ", empirical" if self.empirical else ", sampled labels"
        return f"kronfluence {self.strategy}{fisher}"


@dataclass(frozen=True)
class OursOptions(Options):
    """This library, in a process like the others.

    Attributes:
        spec: The compression.
        hessian: ``eFIM`` or ``Identity``.
        dtype: Of the stored gradients.
        compile: Compiles the pass over the training set, and records it on a GPU; ``blocks`` for a large model.
        deterministic: Asks for deterministic kernels while caching.
    """

    spec: str = "random_mask-128*128->sjlt-4096"
    hessian: str = "eFIM"
    dtype: str = "float32"
    compile: bool | Literal["blocks"] = False
    deterministic: bool = True
    system: ClassVar[str] = "grass_lib"

    def check(self) -> None:
        """Raises UsageError where an option does not fit."""
        CompressionSpec.parse(self.spec)
        parse_hessian(self.hessian)
        _choose("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if self.compile not in (True, False, "blocks"):
            raise UsageError(f"compile is {self.compile!r}; expected True, False or 'blocks'")

    @property
    def label(self) -> str:
        """The system with its options, for tables."""
        spec = CompressionSpec.parse(self.spec)
        first, second = spec.sparsification, spec.projection
        name = str(spec)
        if first.family == "normal" and second.is_identity:
            name = f"LoGra-{spec.k}"
        elif first.family == "random_mask" and first.is_factored and second.family == "sjlt":
            name = f"FactGraSS-{spec.k}" if first.k == 4 * (spec.k or 0) else name
        return f"grass_lib {name}, {self.hessian}"


@dataclass(frozen=True)
class System:
    """One system.

    Attributes:
        title: Its name for people.
        package: On PyPI; also whose version counts.
        options: Class of its options.
        module: Of its adapter, imported in the worker alone.
        source: Where it comes from.
    """

    title: str
    package: str
    options: type[Options]
    module: str
    source: str


SYSTEMS: Mapping[str, System] = MappingProxyType(
    {
        "grass_lib": System("grass_lib", "grass-lib", OursOptions, "grass_lib.baselines.adapters.ours", "this project"),
        "logix": System(
            "LogIX", "logix-ai", LogIXOptions, "grass_lib.baselines.adapters.logix", "github.com/logix-project/logix"
        ),
        "dattri": System(
            "dattri", "dattri", DattriOptions, "grass_lib.baselines.adapters.dattri", "github.com/TRAIS-Lab/dattri"
        ),
        "bergson": System(
            "bergson",
            "bergson",
            BergsonOptions,
            "grass_lib.baselines.adapters.bergson",
            "github.com/EleutherAI/bergson",
        ),
        "kronfluence": System(
            "kronfluence",
            "kronfluence",
            KronfluenceOptions,
            "grass_lib.baselines.adapters.kronfluence",
            "github.com/pomonam/kronfluence",
        ),
    }
)


def check_systems(names: str) -> list[str]:
    """The systems of a list with commas, once each; all of them where it is empty.

    Args:
        names: Keys of `SYSTEMS`.

    Raises:
        UsageError: One is not known.
    """
    chosen = [name.strip() for name in names.split(",")] if names.strip() else list(SYSTEMS)
    for name in chosen:
        if name not in SYSTEMS:
            raise UsageError(f"system {name!r} is not known; expected {', '.join(SYSTEMS)}, with commas between them")
    return list(dict.fromkeys(chosen))

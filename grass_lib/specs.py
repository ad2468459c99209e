"""The strings that people type, parsed once and checked before anything is loaded.

A compression has two stages, each written ``TYPE-DIM``, for example ``--sparsification random_mask-128*128
--projection sjlt-4096``.
"""

import difflib
import re
from dataclasses import dataclass

from grass_lib.errors import SpecError

FAMILIES = (
    "normal",
    "rademacher",
    "sjlt",
    "fjlt",
    "random_mask",
    "selective_mask",
    "grass",
    "selective_grass",
    "identity",
)
MASK_FAMILIES = ("random_mask", "selective_mask")
GRASS_FAMILIES = ("grass", "selective_grass")
HESSIANS = ("eFIM", "Identity")
DEFAULT_BLOWUP = 4
ARROW = "->"

_FORMS = (
    "normal-K, rademacher-K, sjlt-K, sjlt_c-K, fjlt-K, random_mask-K, selective_mask-K, grass-K, grass_N-K, "
    "selective_grass-K, selective_grass_N-K, identity; K may be DIM*DIM (output side first) for layer-wise stages"
)
_STAGE = re.compile(r"(?P<kind>[A-Za-z][A-Za-z_]*?)(?:_(?P<param>\d+))?(?:-(?P<dims>.*))?", re.DOTALL)
# A dimension is an index into a tensor; this also keeps absurd strings from becoming absurd allocations.
_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class StageSpec:
    """One stage of a compression.

    Attributes:
        family: One of ``FAMILIES``.
        dims: ``()`` for identity, ``(k,)`` for a flat stage, ``(d_out, d_in)`` for a factored one.
        param: Nonzeros per column of sjlt, N of grass_N; None for the other families.
    """

    family: str
    dims: tuple[int, ...] = ()
    param: int | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise SpecError(f"family is {self.family!r}; expected one of {', '.join(FAMILIES)}.")
        if self.family == "identity":
            if self.dims or self.param is not None:
                raise SpecError(f"identity takes no dimension; seen dims={self.dims}, param={self.param}.")
            return
        if len(self.dims) not in (1, 2) or any(not 1 <= dim <= _LARGEST for dim in self.dims):
            raise SpecError(f"dims is {self.dims}; expected one or two whole numbers from 1 to {_LARGEST}.")
        if self.family in GRASS_FAMILIES and len(self.dims) != 1:
            raise SpecError(
                f"{self.family} is flat and takes one dimension; seen {self.dims}. A layer-wise GraSS is "
                "written as the pair random_mask-DIM*DIM, sjlt-K."
            )
        if self.family == "sjlt" or self.family in GRASS_FAMILIES:
            default = 1 if self.family == "sjlt" else DEFAULT_BLOWUP
            if self.param is None:
                object.__setattr__(self, "param", default)
            elif self.param < 1:
                raise SpecError(f"{self.family}_{self.param}: the number after the underscore must be at least 1.")
        elif self.param is not None:
            raise SpecError(f"{self.family} takes no number after an underscore; seen {self.param}.")

    @classmethod
    def parse(cls, text: str) -> "StageSpec":
        """Reads one stage.

        Args:
            text: For example ``"sjlt-4096"``, ``"grass_8-2048"``, ``"random_mask-128*64"`` or ``"identity"``.

        Returns:
            The stage; ``str(stage)`` is its canonical form.

        Raises:
            SpecError: With the string, what is wrong with it, the nearest valid form and the list of types.
        """
        if not isinstance(text, str):
            raise SpecError(f"A compression stage is a string such as 'sjlt-4096'; seen {text!r}.")
        stripped = text.strip()
        match = _STAGE.fullmatch(stripped)
        if match is None:
            raise _wrong(text, "it is not of the form TYPE-DIM", "sjlt-4096")
        kind, dims = match["kind"], match["dims"]
        param = None if match["param"] is None else int(match["param"])
        suffix = "" if dims is None else f"-{dims}"
        family = kind
        if family not in FAMILIES:
            near = _nearest_family(kind)
            number = f"_{param}" if param is not None and (near == "sjlt" or near in GRASS_FAMILIES) else ""
            hint = near if near == "identity" else f"{near}{number}{suffix or '-4096'}"
            raise _wrong(text, f"{kind!r} is not a type", _valid_or(hint, near))
        if family == "identity":
            if dims is not None or param is not None:
                raise _wrong(text, "identity takes no dimension", "identity")
            return cls("identity")
        if dims is None:
            raise _wrong(text, "the dimension is missing", f"{stripped}-4096")
        sizes = _parse_dims(text, dims, family)
        if family in GRASS_FAMILIES and len(sizes) == 2:
            raise _wrong(
                text, f"{family} is flat and takes one dimension", f"{family}-{min(sizes[0] * sizes[1], _LARGEST)}"
            )
        if param is not None and not (family == "sjlt" or family in GRASS_FAMILIES):
            raise _wrong(text, f"{family} takes no number after an underscore", f"{family}-{dims}")
        if param is not None and param < 1:
            raise _wrong(text, f"the number in {family}_{param} must be at least 1", f"{family}-{dims}")
        return cls(family, sizes, param)

    @property
    def k(self) -> int | None:
        """Output dimension, the product of the dims; None for identity."""
        if not self.dims:
            return None
        return self.dims[0] if len(self.dims) == 1 else self.dims[0] * self.dims[1]

    @property
    def is_identity(self) -> bool:
        """Whether the stage leaves its input as it is."""
        return self.family == "identity"

    @property
    def is_factored(self) -> bool:
        """Whether the stage acts on the two sides of a layer separately."""
        return len(self.dims) == 2

    @property
    def is_mask(self) -> bool:
        """Whether the stage keeps coordinates and does nothing else."""
        return self.family in MASK_FAMILIES

    @property
    def needs_mask_file(self) -> bool:
        """Whether the kept coordinates come from a mask file."""
        return self.family in ("selective_mask", "selective_grass")

    @property
    def mask_size(self) -> int | None:
        """Number of coordinates that a flat mask or grass stage keeps before projecting; None for other stages."""
        if self.is_mask and not self.is_factored:
            return self.dims[0]
        if self.family in GRASS_FAMILIES:
            return self.dims[0] * (self.param or DEFAULT_BLOWUP)
        return None

    def __str__(self) -> str:
        if self.is_identity:
            return self.family
        default = 1 if self.family == "sjlt" else DEFAULT_BLOWUP
        number = f"_{self.param}" if self.param is not None and self.param != default else ""
        return f"{self.family}{number}-{'*'.join(map(str, self.dims))}"

    @property
    def slug(self) -> str:
        """The canonical form without ``*``, for file names."""
        return str(self).replace("*", "x")


@dataclass(frozen=True)
class CompressionSpec:
    """Both stages of a compression: sparsification, then projection.

    Attributes:
        sparsification: First stage.
        projection: Second stage; on a factored first stage it acts on the flattened result.
    """

    sparsification: StageSpec
    projection: StageSpec

    def __post_init__(self) -> None:
        first, second = self.sparsification, self.projection
        if second.is_factored:
            raise SpecError(
                f"projection is {second}, but the projection acts on a flat vector and takes one dimension; "
                f"nearest valid form: {second.family}-{second.k}. A factored stage is a sparsification."
            )
        if first.is_factored and second.family in GRASS_FAMILIES:
            raise SpecError(
                f"{first}{ARROW}{second}: {second.family} already holds a mask and belongs on whole gradients; "
                f"nearest valid form: {first}{ARROW}sjlt-{second.k}."
            )

    @classmethod
    def parse(
        cls,
        text: "str | CompressionSpec | None" = None,
        *,
        sparsification: str = "identity",
        projection: str = "identity",
    ) -> "CompressionSpec":
        """Reads a compression from its two stages or from one string.

        Args:
            text: ``"A->B"``, or only ``"B"`` for a projection without a sparsification, instead of the pair.
            sparsification: First stage.
            projection: Second stage.

        Returns:
            The compression; ``str(spec)`` can be parsed back.

        Raises:
            SpecError: If a stage is wrong, or both forms are given.
        """
        if isinstance(text, CompressionSpec):
            return text
        if text is None:
            return cls(StageSpec.parse(sparsification), StageSpec.parse(projection))
        if sparsification != "identity" or projection != "identity":
            raise SpecError(f"Both {text!r} and sparsification=/projection= were given; expected one of the two.")
        if not isinstance(text, str):
            raise SpecError(f"A compression is a string such as 'random_mask-128*128->sjlt-4096'; seen {text!r}.")
        stages = text.split(ARROW)
        if len(stages) > 2:
            raise _wrong(text, f"it has {len(stages)} stages", ARROW.join(stage.strip() for stage in stages[:2]))
        if len(stages) == 2:
            return cls(StageSpec.parse(stages[0]), StageSpec.parse(stages[1]))
        only = StageSpec.parse(stages[0])
        if only.is_factored:
            return cls(only, StageSpec("identity"))
        return cls(StageSpec("identity"), only)

    @property
    def k(self) -> int | None:
        """Output dimension per vector (or per layer for factored stages); None where both stages are identity."""
        return self.sparsification.k if self.projection.is_identity else self.projection.k

    @property
    def is_factored(self) -> bool:
        """Whether the first stage acts on the two sides of a layer."""
        return self.sparsification.is_factored

    def __str__(self) -> str:
        if self.sparsification.is_identity:
            return str(self.projection)
        return f"{self.sparsification}{ARROW}{self.projection}"

    @property
    def slug(self) -> str:
        """The canonical form without ``*`` and ``>``, for file names."""
        return str(self).replace(ARROW, "__").replace("*", "x")


def parse_hessian(text: str) -> str:
    """Reads the name of a Hessian: ``eFIM`` or ``Identity``.

    Raises:
        SpecError: If it is something else.
    """
    if text in HESSIANS:
        return text
    near = next((name for name in HESSIANS if name.lower() == str(text).strip().lower()), HESSIANS[0])
    raise SpecError(f"hessian is {text!r}; expected one of {', '.join(HESSIANS)}; nearest valid form: {near}.")


def _parse_dims(text: str, dims: str, family: str) -> tuple[int, ...]:
    parts = dims.split("*")
    if len(parts) > 2:
        raise _wrong(text, f"{dims!r} has {len(parts)} dimensions, at most 2 are allowed", f"{family}-64*64")
    sizes = []
    for part in parts:
        # str.isdigit accepts other scripts' digits and int() accepts signs, blanks and underscores.
        if not re.fullmatch(r"[0-9]+", part):
            digits = re.sub(r"[^0-9]", "", part) or "4096"
            near = "*".join([str(min(max(int(digits), 1), _LARGEST))] * len(parts))
            raise _wrong(text, f"{part!r} is not a whole number", f"{family}-{near}")
        if not 1 <= int(part) <= _LARGEST:
            near = "*".join([str(min(max(int(part), 1), _LARGEST))] * len(parts))
            raise _wrong(text, f"{part} is not between 1 and {_LARGEST}", f"{family}-{near}")
        sizes.append(int(part))
    return tuple(sizes)


def _nearest_family(kind: str) -> str:
    lowered = kind.lower().strip("_")
    if lowered in FAMILIES:
        return lowered
    aliases = {
        "gaussian": "normal",
        "gauss": "normal",
        "random": "random_mask",
        "mask": "random_mask",
        "selective": "selective_mask",
    }
    if lowered in aliases:
        return aliases[lowered]
    return (difflib.get_close_matches(lowered, FAMILIES, n=1, cutoff=0.0) or ["sjlt"])[0]


def _valid_or(hint: str, family: str) -> str:
    """The hint where it parses, else the shortest valid form of its family."""
    try:
        return str(StageSpec.parse(hint))
    except SpecError:
        return "identity" if family == "identity" else f"{family}-4096"


def _wrong(text: str, problem: str, nearest: str) -> SpecError:
    return SpecError(f"{text!r} is not a valid compression: {problem}; nearest valid form: {nearest}. Types: {_FORMS}.")

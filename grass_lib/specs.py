"""The strings that people type, parsed once and validated before any model or data is loaded.

A stage is ``TYPE-DIM`` (flat) or ``TYPE-DIM*DIM`` (factored, output side first); a compression is a sparsification
and a projection, ``random_mask-128*128->sjlt-4096``. The strings follow the command line of the paper (arXiv
2505.18976), in lower case.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from grass_lib.errors import SpecError, UsageError

TYPES = (
    "normal",
    "rademacher",
    "sjlt",
    "sjlt_c",
    "blocksjlt",
    "fjlt",
    "random_mask",
    "selective_mask",
    "grass",
    "grass_N",
    "selective_grass",
    "selective_grass_N",
    "identity",
)
"""Every type as listed in errors; ``c`` and ``N`` stand for a number."""

FAMILIES = tuple(name for name in TYPES if not name.endswith(("_c", "_N")))
"""The types without their number."""

HESSIANS = ("eFIM", "Identity")
"""Curvatures that influence functions know."""

# What sjlt-K and grass-K mean: one nonzero per column, a mask of 4 K coordinates.
_DEFAULT_PARAM = {"sjlt": 1, "grass": 4, "selective_grass": 4}
_MAX_DIM = 2**31 - 1
_STAGE = re.compile(r"([A-Za-z_]+?)(?:_([0-9]+))?-([0-9]+)(?:\*([0-9]+))?")


@dataclass(frozen=True)
class StageSpec:
    """One stage of a compression.

    Attributes:
        family: One of `FAMILIES`.
        dims: Output sizes: ``(k,)`` flat, ``(k_output, k_input)`` factored, ``()`` for identity.
        param: c of ``sjlt_c`` (None is 1), N of ``grass_N`` and ``selective_grass_N`` (None is 4); None elsewhere.

    Raises:
        SpecError: The fields do not make a valid stage.
    """

    family: str
    dims: tuple[int, ...] = ()
    param: int | None = None

    def __post_init__(self) -> None:
        shown = "-".join([str(self.family), "*".join(map(str, self.dims))]).rstrip("-")
        if self.family not in FAMILIES:
            raise _error(shown, f"{self.family!r} is not a type")
        if self.family == "identity":
            if self.dims:
                raise _error(shown, "identity takes no dimension")
        elif len(self.dims) not in (1, 2):
            raise _error(shown, f"{self.family} takes one dimension or two, not {len(self.dims)}")
        default = _DEFAULT_PARAM.get(self.family)
        if default is None and self.param is not None:
            raise _error(shown, f"{self.family} takes no number after its name, and {self.param} was given")
        if self.param is None:
            object.__setattr__(self, "param", default)
        numbers = (*self.dims, *(() if self.param is None else (self.param,)))
        for number in numbers:
            if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= _MAX_DIM:
                raise _error(shown, f"{number!r} is not a whole number from 1 to {_MAX_DIM}")

    @classmethod
    def parse(cls, text: str) -> StageSpec:
        """Parses ``identity``, ``TYPE-DIM`` or ``TYPE-DIM*DIM``; whitespace around it is ignored.

        Args:
            text: For example ``sjlt-4096``, ``grass_8-1024`` or ``random_mask-128*64``.

        Returns:
            The stage; ``str()`` of it is the canonical form.

        Raises:
            SpecError: The string is not a valid stage; the message names the nearest valid form.
        """
        if not isinstance(text, str):
            raise SpecError(f"a spec is {text!r} of type {type(text).__name__}; expected a string such as 'sjlt-4096'")
        stripped = text.strip()
        if stripped == "identity":
            return cls("identity")
        if stripped.partition("-")[0] == "identity":
            raise _error(text, "identity takes no dimension")
        match = _STAGE.fullmatch(stripped)
        if match is None:
            raise _error(text, _what_is_wrong(stripped))
        family, param, *dims = match.groups()
        if family not in FAMILIES:
            written = stripped.partition("-")[0]
            hint = "" if family.islower() else " (types are lower case)"
            raise _error(text, f"{written!r} is not a type{hint}")
        if param is not None and family not in _DEFAULT_PARAM:
            raise _error(text, f"{family} takes no number after its name, and _{param} was given")
        numbers = [number for number in (param, *dims) if number is not None]
        for number in numbers:
            if number.startswith("0") or int(number) > _MAX_DIM:
                raise _error(text, f"{number!r} is not a whole number from 1 to {_MAX_DIM}, without leading zeros")
        return cls(family, tuple(int(dim) for dim in dims if dim is not None), None if param is None else int(param))

    @property
    def k(self) -> int | None:
        """Output size: the product of the dimensions; None for identity."""
        if not self.dims:
            return None
        return self.dims[0] if len(self.dims) == 1 else self.dims[0] * self.dims[1]

    @property
    def is_identity(self) -> bool:
        """Whether the stage changes nothing."""
        return self.family == "identity"

    @property
    def is_factored(self) -> bool:
        """Whether the stage acts on the two sides of a layer's gradient, ``TYPE-DIM*DIM``."""
        return len(self.dims) == 2

    @property
    def is_mask(self) -> bool:
        """Whether the stage only keeps some coordinates."""
        return self.family in ("random_mask", "selective_mask")

    @property
    def needs_mask_file(self) -> bool:
        """Whether the kept coordinates come from a mask file."""
        return self.family in ("selective_mask", "selective_grass")

    @property
    def mask_size(self) -> int | None:
        """Number of coordinates that a flat mask, grass or selective stage keeps; None for the other types."""
        if self.is_factored or self.k is None:
            return None
        if self.is_mask:
            return self.k
        return self.k * (self.param or 1) if self.family in ("grass", "selective_grass") else None

    def check_input(self, p: int) -> None:
        """Checks that a flat stage can take inputs of size ``p``.

        Raises:
            SpecError: ``p`` is smaller than what the type needs: k for masks and fjlt, N*k for grass.
        """
        needed = self.k if self.family == "fjlt" else self.mask_size
        if self.is_factored or needed is None or needed <= p:
            return
        largest = p // ((self.param or 1) if self.family.endswith("grass") else 1)
        nearest = str(StageSpec(self.family, (largest,), self.param)) if largest else f"sjlt-{self.k}"
        raise _error(
            str(self),
            f"it needs {needed} input coordinates or more, and there are {p} (only sjlt, blocksjlt, normal and "
            "rademacher may have more outputs than inputs)",
            nearest,
        )

    def __str__(self) -> str:
        number = "" if self.param == _DEFAULT_PARAM.get(self.family) else f"_{self.param}"
        return self.family + number + ("-" if self.dims else "") + "*".join(map(str, self.dims))

    @property
    def slug(self) -> str:
        """The canonical form for file names: ``*`` written as ``x``."""
        return str(self).replace("*", "x")


@dataclass(frozen=True)
class CompressionSpec:
    """Both stages of a compression.

    Attributes:
        sparsification: First stage, flat or factored.
        projection: Second stage, flat; its input is the first stage's output.

    Raises:
        SpecError: The projection is factored, or needs more inputs than the sparsification gives.
    """

    sparsification: StageSpec
    projection: StageSpec

    def __post_init__(self) -> None:
        if self.projection.is_factored:
            raise _error(
                str(self.projection),
                "a projection is flat, TYPE-DIM, and only a sparsification can be factored, TYPE-DIM*DIM",
                f"{self.projection.family}-{self.projection.k} (or '{self.projection}->identity')",
            )
        if self.sparsification.k is not None:
            self.projection.check_input(self.sparsification.k)

    @classmethod
    def parse(
        cls,
        text: str | None = None,
        *,
        sparsification: str | StageSpec = "identity",
        projection: str | StageSpec = "identity",
    ) -> CompressionSpec:
        """Parses one string, or the two stages by name.

        Args:
            text: ``A->B``, or ``B`` alone where nothing is sparsified first.
            sparsification: First stage, when ``text`` is None.
            projection: Second stage, when ``text`` is None.

        Returns:
            The compression; ``str()`` of it gives the canonical string, which parses to the same.

        Raises:
            SpecError: A stage is invalid, the two do not fit, or both forms are used at once.
        """
        if text is not None:
            if sparsification != "identity" or projection != "identity":
                raise SpecError(
                    f"{text!r} was given together with sparsification={str(sparsification)!r}, "
                    f"projection={str(projection)!r}; give either one string or the two stages"
                )
            if not isinstance(text, str):
                raise SpecError(
                    f"a spec is {text!r} of type {type(text).__name__}; expected a string such as "
                    "'random_mask-128*128->sjlt-4096'"
                )
            parts = text.split("->")
            if len(parts) > 2:
                raise _error(
                    text,
                    f"it has {len(parts)} stages; expected PROJECTION, or SPARSIFICATION->PROJECTION",
                    f"{_nearest(parts[0])}->{_nearest(parts[-1].partition('*')[0])}",
                )
            projection = parts[-1]
            sparsification = parts[0] if len(parts) == 2 else "identity"
        first = sparsification if isinstance(sparsification, StageSpec) else StageSpec.parse(sparsification)
        second = projection if isinstance(projection, StageSpec) else StageSpec.parse(projection)
        return cls(first, second)

    def check_shorter(self) -> None:
        """Checks that stage 2 makes the gradient of a layer shorter; where it would not, it is left out there.

        Raises:
            SpecError: It would be left out for every layer, and the compression be another one than its name says.
        """
        first, second = self.sparsification, self.projection
        if first.is_factored and first.k is not None and second.k is not None and second.k >= first.k:
            raise _error(
                str(self),
                f"stage 2 has {second.k} outputs and stage 1 only {first.k}, so it would be left out; expected a "
                "smaller stage 2, or identity",
                f"{first}->identity",
            )

    @property
    def k(self) -> int | None:
        """Final output size (per layer for factored specs); None when both stages are identity."""
        return self.sparsification.k if self.projection.is_identity else self.projection.k

    @property
    def is_factored(self) -> bool:
        """Whether the sparsification acts on the two sides of a layer's gradient."""
        return self.sparsification.is_factored

    @property
    def needs_mask_file(self) -> bool:
        """Whether a stage takes its coordinates from a mask file."""
        return self.sparsification.needs_mask_file or self.projection.needs_mask_file

    def __str__(self) -> str:
        if self.sparsification.is_identity:
            return str(self.projection)
        return f"{self.sparsification}->{self.projection}"

    @cached_property
    def slug(self) -> str:
        """The canonical form for file names: ``*`` written as ``x`` and ``->`` as ``__``."""
        return str(self).replace("->", "__").replace("*", "x")


def parse_specs(text: str | Iterable[str | CompressionSpec]) -> list[CompressionSpec]:
    """Parses several compressions.

    Args:
        text: Specs with commas between them, or a list of specs; empty for none.

    Returns:
        The specs in their order.

    Raises:
        SpecError: One of them cannot be parsed, an entry is empty, or a compression is there twice.
    """
    entries = text.split(",") if isinstance(text, str) and text.strip() else [] if isinstance(text, str) else list(text)
    parsed = [entry if isinstance(entry, CompressionSpec) else CompressionSpec.parse(entry) for entry in entries]
    twice = next((spec for place, spec in enumerate(parsed) if spec in parsed[:place]), None)
    if twice is not None:
        raise SpecError(f"the specs have {twice} twice; expected every compression once, so leave one of them out")
    return parsed


def parse_hessian(text: str) -> str:
    """Checks the name of a curvature.

    Args:
        text: One of `HESSIANS`; whitespace around it is ignored.

    Returns:
        The name.

    Raises:
        UsageError: Another name; the message gives the nearest one.
    """
    name = text.strip() if isinstance(text, str) else text
    if name in HESSIANS:
        return name
    folded = {hessian.lower(): hessian for hessian in HESSIANS}
    close = difflib.get_close_matches(str(name).lower(), folded, n=1, cutoff=0.0)
    raise UsageError(
        f"{text!r} is not a Hessian; nearest valid form: {folded[close[0]]}. Hessians: {', '.join(HESSIANS)}"
    )


def _what_is_wrong(text: str) -> str:
    """Says why a string does not have the form of a stage."""
    name, dash, dims = text.partition("-")
    if not text:
        return "it is empty"
    if "->" in text:
        return "it has two stages, and one was expected here"
    if re.sub(r"_?[0-9]+$", "", name.lower()) not in FAMILIES:
        return f"{name!r} is not a type"
    if not dash or not dims:
        return "the dimension is missing (TYPE-DIM or TYPE-DIM*DIM)"
    if re.fullmatch(r"[0-9*]+", dims) and dims.count("*") > 1:
        return f"it has {dims.count('*') + 1} dimensions, and one or two were expected"
    if not re.fullmatch(r"[0-9]+(\*[0-9]+)?", dims):
        return f"{dims!r} is not a dimension (DIM or DIM*DIM, whole numbers)"
    return f"{name!r} is not a type"


def _nearest(text: str) -> str:
    """The valid stage that looks most like ``text``."""
    name, _, rest = text.split("->")[-1].strip().lower().partition("-")
    rest = re.sub(r"(?<=[0-9])[_, ](?=[0-9])", "", rest)
    letters = re.match(r"[a-z_ ]*", name)
    stem = (letters.group() if letters else "").strip("_ ").replace(" ", "_")
    family = difflib.get_close_matches(stem, FAMILIES, n=1, cutoff=0.5) or ["sjlt"]
    if family[0] == "identity":
        return "identity"
    # A number glued to the name is its parameter, where the type has one and a dimension follows; else the dimension.
    glued = [int(number) for number in re.findall(r"[0-9]+", name)]
    dims = [int(number) for number in re.findall(r"[0-9]+", rest)]
    param = None
    if glued and (family[0] in _DEFAULT_PARAM) and dims:
        param = glued[0] or None
    elif not dims:
        dims = glued
    usable = tuple(dim for dim in dims if 1 <= dim <= _MAX_DIM)[:2] or (4096,)
    return str(StageSpec(family[0], usable, param if param is None or param <= _MAX_DIM else None))


def _error(text: str, reason: str, nearest: str | None = None) -> SpecError:
    return SpecError(f"{text!r}: {reason}; nearest valid form: {nearest or _nearest(text)}. Types: {', '.join(TYPES)}")

"""Dense Gaussian and Rademacher projections on the GPU; the reference is `projection.dense`."""

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from grass_lib.errors import UsageError
from grass_lib.kernels.launch import finish, flat_rows, processors

_COLUMNS = {"rademacher": 128, "normal": 64}  # columns a step of the program


@dataclass(frozen=True)
class DenseTuning:
    """Choices that change speed and the order of additions; None picks by shape.

    Attributes:
        outputs: Outputs a program.
        rows: Rows of the batch a program.
        warps: Warps a program.
        stages: Loads in flight.
    """

    outputs: int | None = None
    rows: int | None = None
    warps: int | None = None
    stages: int = 2


class DenseKernel:
    """A fixed dense projection; the matrix is drawn tile by tile and never stored.

    Args:
        family: ``"normal"`` or ``"rademacher"``.
        key: The stream's two 32-bit key words.
        p: Input dimension.
        k: Output dimension.
        scale: Factor on every output, ``1 / sqrt(k)``.

    Raises:
        UsageError: Triton is not installed, or the family is another.
    """

    def __init__(
        self, family: str, key: tuple[int, int], p: int, k: int, scale: float, *, tuning: DenseTuning | None = None
    ) -> None:
        if family not in _COLUMNS:
            raise UsageError(f"family must be one of {sorted(_COLUMNS)}, got {family!r}")
        try:
            self._programs = importlib.import_module("grass_lib.kernels.dense_triton")
        except ImportError as error:
            raise UsageError(
                f'backend="kernel" needs Triton for {family} ({error}); install it with `pip install triton`, or use '
                'backend="torch"'
            ) from error
        self.family = family
        # Triton picks a type by value; as signed 32-bit words all keys have one.
        self._key = tuple(word - (1 << 32) if word >= 1 << 31 else word for word in key)
        self.p = p
        self.k = k
        self.scale = scale
        self._tuning = tuning or DenseTuning()

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Projects ``(n, p)`` to ``(n, k)`` of type ``dtype``; fp32 input keeps fp32 accuracy."""
        x = flat_rows(x)
        batch = x.shape[0]
        out = torch.empty(batch, self.k, dtype=dtype, device=x.device)
        if batch == 0:
            return out
        tuning = self._tuning
        rows = tuning.rows or min(64 if self.family == "normal" else 128, max(16, 1 << (batch - 1).bit_length()))
        outputs = tuning.outputs or 128
        warps = tuning.warps or (8 if rows * outputs >= 128 * 128 else 4)
        batch_tiles = -(-batch // rows)
        output_tiles = -(-self.k // outputs)
        chunks = -(-self.p // _COLUMNS[self.family])
        slots = 2 * processors(x.device)
        splits = max(1, min(chunks, slots // (batch_tiles * output_tiles)))
        if splits > 1 or batch_tiles * output_tiles > slots:
            waves = -(-batch_tiles * output_tiles * splits // slots)
            splits = max(1, min(chunks, waves * slots // (batch_tiles * output_tiles)))
        chunks_a_split = -(-chunks // splits)
        splits = -(-chunks // chunks_a_split)
        parts = torch.empty(splits, batch, self.k, dtype=torch.float32, device=x.device)
        tl = self._programs.tl
        types = {torch.float32: tl.bfloat16, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
        constants = {"BK": outputs, "BM": rows, "num_warps": warps, "num_stages": tuning.stages}
        if self.family == "rademacher":
            constants |= {"SPLIT": x.dtype == torch.float32, "TYPE": types[x.dtype]}
        getattr(self._programs, self.family)[(batch_tiles * output_tiles, splits)](
            x, x.stride(0), batch, self.p, *self._key, parts, self.k, chunks, chunks_a_split, batch_tiles, **constants
        )
        return finish(parts, out, self.scale)

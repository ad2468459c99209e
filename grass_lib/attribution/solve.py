"""The damped Gram solve of TRAK for a whole grid of damping values.

For features ``Phi (n, k)`` and queries ``Q (m, k)`` the scores are ``Phi (Phi^T Phi + lambda I)^-1 Q^T``. Where k > n
the same scores come from the smaller system ``(Phi Phi^T + lambda I)^-1 Phi Q^T``. The Gram matrix is formed once;
each damping value then needs one factorisation and solve.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from grass_lib.errors import GrassError, UsageError

SolveMethod: TypeAlias = Literal["auto", "cholesky", "eigh"]
METHODS: tuple[SolveMethod, ...] = ("auto", "cholesky", "eigh")

_BLOCK_BYTES = 256 * 2**20
_log = logging.getLogger(__name__)


def damping_grid(damping: float | Sequence[float] | Tensor) -> tuple[list[float], bool]:
    """The damping values as a list, and whether a single number was given.

    Raises:
        UsageError: If there are none, or one is not a finite number above 0.
    """
    single = isinstance(damping, Real) or getattr(damping, "ndim", None) == 0
    if isinstance(damping, str | bytes | Mapping) or not (single or isinstance(damping, Iterable)):
        raise _no_damping(damping)
    values = [_damping_value(value) for value in ([damping] if single else damping)]  # type: ignore[union-attr]
    if not values:
        raise UsageError("damping is an empty list; expected at least one value above 0, for example 0.1.")
    for value in values:
        if not 0.0 < value < float("inf"):
            raise UsageError(f"damping is {value}; expected a finite number above 0, for example 0.1.")
    return values, single


def _damping_value(value: Any) -> float:
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(number, bool) or not isinstance(number, Real):
        raise _no_damping(value)
    return float(number)


def _no_damping(value: Any) -> UsageError:
    seen = f"a {type(value).__name__} of shape {tuple(value.shape)}" if hasattr(value, "shape") else repr(value)
    return UsageError(f"damping is {seen}; expected a number above 0, for example 0.1, or a list of such numbers.")


def damped_scores(
    train: Tensor,
    query: Tensor,
    damping: Sequence[float],
    *,
    relative: bool = True,
    method: SolveMethod = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """Scores ``phi_i^T (Phi^T Phi + lambda I)^-1 phi_q`` for every training sample, query and damping value.

    Gram matrix, factorisation and products are in float64, the result is rounded to float32. That is measured: with
    random_mask-1024 on an MLP trained on 2,000 MNIST digits, float32 arithmetic is off by 40 % of the largest score at
    a relative damping of 1e-7, 0.3 % at 1e-5 and 3e-6 at 1e-2, because the Gram matrix of a mask is singular; float64
    is off by less than 1e-9 on the whole grid (Cholesky against eigenvectors). With sjlt-1024, whose Gram matrix has
    full rank, float32 is off by 1e-5. On the synthetic digits of benchmarks/damping_grid.py, at the paper's sizes, its
    factorisation fails at 1e-7 for random_mask-2048 and -4096.

    ``"auto"`` goes by the device alone, so that a value gives the same numbers by itself and in a grid. On a GPU it is
    Cholesky: with n = 5,000 and 500 queries on an H200, ten values take 27, 58 and 81 ms at k = 2,048, 4,096 and 8,192
    (one value 4, 9 and 15 ms), the eigendecomposition 31, 119 and 198 ms. On a CPU it is the eigendecomposition: with
    n = 2,000 and 100 queries on one thread, ten values take 48, 152 and 554 ms at k = 256, 512 and 1,024, Cholesky 49,
    158 and 598 ms (it is two to three times faster for one value: 11, 42 and 141 ms against 17, 88 and 382 ms).

    Args:
        train: Features of the training samples ``(n_train, k)``.
        query: Features of the queries ``(n_query, k)``, on the same device.
        damping: Values above 0.
        relative: True multiplies the damping with the mean eigenvalue ``tr(Phi^T Phi) / k``; False takes it as it is.
        method: ``"cholesky"`` factorises once per damping value, ``"eigh"`` once for all; ``"auto"`` as above.
        out: Is added to, ``(n_damping, n_train, n_query)``; None starts from zeros in float32.

    Returns:
        ``(n_damping, n_train, n_query)``, higher where the sample raises the query's output more.

    Raises:
        UsageError: If shapes, damping or method do not fit.
        GrassError: If features are not finite, are all zero under a relative damping, or a damping value is too small
            for the matrix to be solved in float64.
    """
    values, _ = damping_grid(damping)
    if method not in METHODS:
        raise UsageError(f"method is {method!r}; expected one of {', '.join(METHODS)}.")
    if method == "auto":
        method = "cholesky" if train.device.type == "cuda" else "eigh"
    _check_features(train, query)
    n, k = train.shape
    if out is None:
        out = torch.zeros(len(values), n, len(query), device=train.device)
    elif out.shape != (len(values), n, len(query)):
        raise UsageError(f"out has shape {tuple(out.shape)}; expected {(len(values), n, len(query))}.")
    dual = k > n
    if dual:
        matrix, right = _dual_system(train, query)
    else:
        matrix, right = _primal_matrix(train), query.double().mT
    trace = float(matrix.diagonal().sum())
    if not trace < float("inf"):
        raise GrassError("The features hold values that are not finite or overflow when squared; check the gradients.")
    if relative and trace == 0.0:
        raise GrassError(
            "All training features are zero, so a damping relative to their mean eigenvalue is undefined; "
            "check that the output depends on the trainable weights."
        )
    shifts = [value * trace / k for value in values] if relative else values
    whole = train.double() if not dual and n * k * 8 <= _BLOCK_BYTES else None
    for index, solution in enumerate(shifted_solves(matrix, right, shifts, method=method)):
        if dual:
            out[index].add_(solution)
            continue
        for rows in [slice(0, n)] if whole is not None else _blocks(n, k):
            block = whole if whole is not None else train[rows].double()
            # The transposed product, because CPU libraries are about twice as fast with the short side first.
            out[index, rows].add_((solution.mT @ block.mT).mT)
    return out


def shifted_solves(
    matrix: Tensor, right: Tensor, shifts: Sequence[float], *, method: Literal["cholesky", "eigh"] = "cholesky"
) -> Iterator[Tensor]:
    """Solves ``(matrix + shift I) X = right`` for each shift in turn.

    Where rounding makes a Cholesky factorisation fail, the eigendecomposition takes over for the remaining shifts,
    with the negative eigenvalues (rounding as well: a Gram matrix has none) set to 0.

    Args:
        matrix: Symmetric positive semi-definite ``(d, d)``, float64.
        right: ``(d, m)``.
        shifts: Values above 0.
        method: As in :func:`damped_scores`.

    Yields:
        ``X (d, m)``, one per shift.

    Raises:
        GrassError: If a shift is lost in the rounding of the largest eigenvalue.
    """
    spectrum: tuple[Tensor, Tensor, Tensor] | None = None
    for shift in shifts:
        if method == "cholesky" and spectrum is None:
            shifted = matrix.clone()
            shifted.diagonal().add_(shift)
            factor, info = torch.linalg.cholesky_ex(shifted)
            del shifted
            if int(info) == 0:
                yield torch.cholesky_solve(right, factor)
                continue
            del factor
            _log.info("Cholesky failed at shift %g; using the eigendecomposition instead.", shift)
        if spectrum is None:
            values, vectors = torch.linalg.eigh(matrix)
            spectrum = values.clamp_(min=0.0), vectors, vectors.mT @ right
        values, vectors, rotated = spectrum
        resolution = float(values[-1]) * torch.finfo(matrix.dtype).eps
        if shift < resolution:
            raise GrassError(
                f"A damping of {shift:g} (absolute) is below what {matrix.dtype} resolves beside the largest "
                f"eigenvalue {float(values[-1]):g}: the Gram matrix is not positive definite. Use a larger damping, "
                f"at least {resolution:g} absolute."
            )
        yield vectors @ (rotated / (values + shift)[:, None])


def _primal_matrix(train: Tensor) -> Tensor:
    """``Phi^T Phi (k, k)`` in float64, row block by row block."""
    n, k = train.shape
    matrix = torch.zeros(k, k, dtype=torch.float64, device=train.device)
    for rows in _blocks(n, k):
        block = train[rows].double()
        matrix.addmm_(block.mT, block)
    return matrix


def _dual_system(train: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """``Phi Phi^T (n, n)`` and ``Phi Q^T (n, m)`` in float64, column block by column block."""
    n, k = train.shape
    matrix = torch.zeros(n, n, dtype=torch.float64, device=train.device)
    right = torch.zeros(n, len(query), dtype=torch.float64, device=train.device)
    for columns in _blocks(k, n + len(query)):
        block = train[:, columns].double()
        matrix.addmm_(block, block.mT)
        right.addmm_(block, query[:, columns].double().mT)
    return matrix, right


def _blocks(length: int, width: int) -> Iterator[slice]:
    """Slices of a dimension so that a float64 block of the given width stays within the budget."""
    step = max(1, _BLOCK_BYTES // (8 * max(1, width)))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _check_features(train: Tensor, query: Tensor) -> None:
    if train.dim() != 2 or query.dim() != 2 or train.shape[1] != query.shape[1]:
        raise UsageError(
            f"Training features have shape {tuple(train.shape)} and query features {tuple(query.shape)}; "
            "expected (n_train, k) and (n_query, k)."
        )
    if 0 in train.shape:
        raise UsageError(f"Training features have shape {tuple(train.shape)}; expected at least one sample.")
    if train.device != query.device:
        raise UsageError(f"Training features are on {train.device} and query features on {query.device}; move one.")

"""What masks of layers are chosen from: energies of both sides over all samples, and thin factors of some samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grass_lib.devices import device_of_model
from grass_lib.errors import UsageError
from grass_lib.gradients.full import batch_size, batch_to
from grass_lib.gradients.layers import LayerChoice, LayerShape, find_layers
from grass_lib.gradients.order import check_order
from grass_lib.gradients.outputs import Batch, Output, check_output
from grass_lib.gradients.stream import sample_count
from grass_lib.masks.low_rank import low_rank, side_energies
from grass_lib.masks.token_pairs import Factors, Pairs
from grass_lib.masks.token_pass import TokenPass
from grass_lib.rng import Stream

SAMPLES, RANK = 256, 16
"""Training samples whose gradients are kept for ``learned``, and rows of their factors."""
CACHE_BYTES = 16 * 2**30
"""Most bytes of kept factors."""
_FEWEST = 20
_SHOWN = 8


@dataclass(frozen=True, eq=False)
class LayerSamples:
    """One layer.

    Attributes:
        shape: Of its gradient.
        energy: Sums over all samples of the squared norms of the gradients' rows ``(d_out,)`` and columns ``(d_in,)``,
            float64 on the CPU.
        fit: Pairs to learn from; None where no samples were kept.
        held_out: Other pairs, of samples and queries that ``fit`` has not.
        kept_energy: Share of the kept samples' squared gradients that is in their factors.
    """

    shape: LayerShape
    energy: tuple[Tensor, Tensor]
    fit: Pairs | None
    held_out: Pairs | None
    kept_energy: float


def collect(
    model: nn.Module,
    loss: Output,
    loader: Iterable[Batch],
    *,
    layers: LayerChoice = "linear",
    include_head: bool = False,
    queries: Iterable[Batch] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    samples: int = SAMPLES,
    rank: int = RANK,
    cache_bytes: int = CACHE_BYTES,
    progress: bool = True,
) -> tuple[dict[str, LayerSamples], int]:
    """Goes through the data once, for all layers together.

    Memory: ``4 samples rank (d_out + d_in)`` bytes a layer for the kept samples, and what one batch needs. A gradient
    of size d_out * d_in is never formed. The kept samples are a random choice, the same for every batch size.

    Args:
        model: On the device where gradients are computed.
        loss: ``loss(model, batch) -> (batch,)``.
        loader: Training samples in a fixed order.
        layers: Which layers, as in `find_layers`: linear ones and transformers' Conv1D.
        include_head: Whether kinds take a language model's output layer too.
        queries: Queries for the pairs; None lets the kept samples be each other's queries.
        seed: Of the choice of samples.
        device: None for the model's; anything else must be that device.
        samples: Kept training samples, and as many queries; 0 keeps none, for methods that need only energies.
        rank: Most rows of a sample's factors; samples with no more tokens lose nothing.
        cache_bytes: Fewer samples are kept where they would need more.
        progress: Shows a bar when it lasts more than 3 s.

    Returns:
        By layer, and the number of training samples.

    Raises:
        UsageError: An argument is out of range, a loader shuffles, there are too few samples, or a layer's gradients
            are all zero or not finite.
    """
    if 0 < samples < _FEWEST or samples < 0 or rank < 1:
        raise UsageError(f"samples is {samples} and rank {rank}; expected at least {_FEWEST} samples and 1 row")
    check_output(loss, "loss")
    device_of_model(model, device)
    check_order(loader)
    if queries is not None:
        check_order(queries, every_sample=False)
    shapes = find_layers(model, layers, include_head=include_head)
    if samples:
        dtype = next(model.parameters()).dtype
        sides = sum(min(rank, shape.d_out, shape.d_in) * (shape.d_out + shape.d_in) for shape in shapes.values())
        most = cache_bytes // (sides * (8 if dtype == torch.float64 else 4) * (2 if queries is not None else 1))
        if most < _FEWEST:
            raise UsageError(
                f"cache_bytes is {cache_bytes}, which holds {most} samples of rank {rank} of these {len(shapes)} "
                f"layers; expected room for {_FEWEST}, or a smaller rank="
            )
        samples = min(samples, most)
    train = _Collector(model, loss, shapes, seed, "train", samples, rank)
    n = train.run(loader, progress)
    asked = None
    if queries is not None and samples:
        asked = _Collector(model, loss, shapes, seed, "queries", samples, rank)
        asked.run(queries, progress)
    return {name: train.finish(name, shape, asked) for name, shape in shapes.items()}, n


class _Collector:
    """Sums energies and keeps the factors of some samples during a pass."""

    def __init__(
        self,
        model: nn.Module,
        loss: Output,
        shapes: Mapping[str, LayerShape],
        seed: int,
        role: str,
        samples: int,
        rank: int,
    ) -> None:
        self._pass = TokenPass(model, loss, shapes, self._visit)
        self._shapes, self._seed, self._role = shapes, seed, role
        self._wanted, self._rank = samples, rank
        weight = next(model.parameters())
        self._dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._kept = torch.empty(0, dtype=torch.bool)
        self._starts: dict[str, Tensor] = {}
        self._energy = {
            name: [torch.zeros(d, dtype=torch.float64, device=weight.device) for d in (shape.d_out, shape.d_in)]
            for name, shape in shapes.items()
        }
        self._factors: dict[str, dict[int, tuple[Tensor, Tensor]]] = {name: {} for name in shapes}
        self._whole = dict.fromkeys(shapes, 0.0)

    def run(self, loader: Iterable[Batch], progress: bool) -> int:
        n = sample_count(loader)
        if n is None:
            n = sum(batch_size(batch_to(batch, torch.device("cpu"))) for batch in loader)
        fewest = _FEWEST if self._wanted else 2
        if n < fewest:
            raise UsageError(f"there are {n} samples for {self._role}; expected at least {fewest}")
        order = Stream(self._seed, self._role, "mask/samples").permutation(n)
        self._kept = torch.zeros(n, dtype=torch.bool)
        self._kept[order[: self._wanted]] = True
        seen = self._pass.walk(loader, description=f"gradients ({self._role})", progress=progress)
        if seen != n:
            raise UsageError(f"the loader announced {n} samples for {self._role} and gave {seen}; expected the same")
        return n

    def _visit(self, name: str, first: int, delta: Tensor, x: Tensor) -> None:
        rows, columns = side_energies(delta, x)
        wide = [side.to(torch.float64) for side in (rows, columns)]
        sums = wide[0].sum(dim=1) + wide[1].sum(dim=1)
        if not bool(torch.isfinite(sums).all()):
            bad = (torch.nonzero(~torch.isfinite(sums)).flatten() + first).tolist()
            shown = ", ".join(map(str, bad[:_SHOWN])) + (f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")
            raise UsageError(
                f"the gradients of layer '{name}' at sample(s) {shown} of {self._role} hold NaN or infinity; leave "
                "these samples out, or use a loss that stays finite"
            )
        for total, side in zip(self._energy[name], wide, strict=True):
            for row in side:  # one by one, so that sums round alike for every batch size
                total += row
        chosen = torch.nonzero(self._kept[first : first + len(delta)]).flatten()
        if not len(chosen):
            return
        place = chosen.to(delta.device)
        self._whole[name] += float(wide[0][place].sum())
        left, right = low_rank(delta[place], x[place], self._rank, self._start(name, x))
        for number, pair in zip(chosen.tolist(), zip(left, right, strict=True), strict=True):
            self._factors[name][first + number] = pair[0].to(self._dtype, copy=True), pair[1].to(self._dtype, copy=True)

    def _start(self, name: str, x: Tensor) -> Tensor:
        if name not in self._starts:
            stream = Stream(self._seed, name, "mask/range")
            self._starts[name] = stream.normal((x.shape[2], self._rank), device=x.device, dtype=x.dtype)
        return self._starts[name]

    def finish(self, name: str, shape: LayerShape, asked: _Collector | None) -> LayerSamples:
        rows, columns = (side.cpu() for side in self._energy[name])
        if not bool((rows > 0).any()):
            raise UsageError(
                f"all gradients of layer '{name}' are zero: no coordinate is better than another; look at the loss, or "
                "leave the layer out of layers="
            )
        if not self._wanted:
            return LayerSamples(shape, (rows, columns), None, None, 0.0)
        samples, share = self._stacked(name)
        split = self._split(samples.n)
        if asked is None:
            fit, held = (Pairs(None, samples.at(part)) for part in split)
        else:
            queries, share_of_queries = asked._stacked(name)
            share = min(share, share_of_queries)
            pairs = zip(asked._split(queries.n), split, strict=True)
            fit, held = (Pairs(queries.at(some), samples.at(part)) for some, part in pairs)
        return LayerSamples(shape, (rows, columns), fit, held, share)

    def _split(self, n: int) -> tuple[Tensor, Tensor]:
        """Samples to fit to, and a quarter that is held out."""
        order = Stream(self._seed, self._role, "mask/held_out").permutation(n)
        return order[n // 4 :].sort().values, order[: n // 4].sort().values

    def _stacked(self, name: str) -> tuple[Factors, float]:
        """The kept samples, of ordinary size, and the share of their energy that is in the factors."""
        found = self._factors.pop(name)
        pairs = [found[number] for number in sorted(found)]
        if not pairs:
            raise UsageError(f"no {self._role} samples reach layer '{name}'; leave it out of layers=")
        rows = max(len(left) for left, _ in pairs)
        sides = []
        for place, d in enumerate((self._shapes[name].d_out, self._shapes[name].d_in)):
            side = pairs[0][place].new_zeros(len(pairs), rows, d)
            for number, pair in enumerate(pairs):
                side[number, : len(pair[place])] = pair[place]
            sides.append(side)
        largest = [float(side.abs().max()) or 1.0 for side in sides]
        factors = Factors(sides[0].div_(largest[0]), sides[1].div_(largest[1]))
        squares = side_energies(factors.left, factors.right)[0].to(torch.float64).sum()
        whole = self._whole[name] / largest[0] ** 2 / largest[1] ** 2
        return factors, min(1.0, float(squares) / whole) if whole > 0 else 1.0

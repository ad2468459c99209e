"""Influence functions on compressed gradients of layers, kept in a store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grass_lib.attribution.caching import check_compile
from grass_lib.attribution.filling import StoreFiller
from grass_lib.attribution.origin import KeptStore
from grass_lib.attribution.preconditioner import PRECISIONS, LayerBasis, Precision, decompose
from grass_lib.attribution.ranking import TopK, TopKMerge, checked_k
from grass_lib.attribution.scoring import Scorer, clocked
from grass_lib.attribution.solve import damping_grid
from grass_lib.errors import UsageError
from grass_lib.gradients.factored import FactoredGradients
from grass_lib.gradients.layers import LayerChoice
from grass_lib.gradients.maps import LayerMasks, LayerMatrices
from grass_lib.gradients.outputs import Batch, Output, check_output
from grass_lib.gradients.passes import Compile
from grass_lib.precision import exact_products
from grass_lib.ranks import Ranks, is_sharded
from grass_lib.specs import parse_hessian
from grass_lib.store import Store
from grass_lib.store.formats import parse_dtype

Damping = float | Sequence[float] | Tensor
_SECONDS = ("opening", "gradients", "compression", "writing", "curvature", "query_gradients", "scoring")


class InfluenceFunction:
    """Influence functions with a block-diagonal empirical Fisher matrix (eFIM), one block per layer.

    With rows ``g_il`` (compressed loss gradients of sample i at layer l, as they are stored), ``h_ql`` (those of minus
    the target at query q) and ``F_l = (1/n) sum_i g_il g_il^T``,

        score[i, q] = sum_l g_il . (F_l + damping * tr(F_l) / k_l * I)^-1 . h_ql.

    A positive score means that training on the sample raises the query's target. With hessian "Identity" the matrix is
    left out.

    Samples must lie on dimension 0 of every captured layer's output. A pass over one sample looks at that first, and
    refuses a layer that takes the sequence first (``batch_first=False``).

    A layer with fewer features than samples has its ``F_l`` decomposed, one with more the samples' Gram matrix; the
    scores are the same. One decomposition serves all damping values.

    Attributes:
        timings: Seconds: ``opening`` (the model's hash, the store's folder), ``gradients`` and ``compression`` (forward
            and backward pass, both stages), ``writing`` (what was waited for the disk) and ``curvature`` since the last
            :meth:`cache` began; ``query_gradients`` and ``scoring`` of the last call that scored. ``samples`` is how
            many were computed by the last :meth:`cache`.
        residuals: By layer, how far its eigenvectors are from exact: the largest ``|F v - s v|`` over the largest
            eigenvalue.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Output,
        *,
        layers: LayerChoice = "linear",
        include_head: bool = False,
        sparsification: str = "identity",
        projection: str = "identity",
        hessian: str = "eFIM",
        target: Output | None = None,
        store: str | Path | None = None,
        dtype: torch.dtype | str = torch.float32,
        seed: int = 0,
        device: str | torch.device | None = None,
        masks: LayerMasks | None = None,
        matrices: LayerMatrices | None = None,
        backend: str = "auto",
        shard_size: int | None = None,
        deterministic: bool = True,
        compile: Compile = False,
        precision: Precision = "mixed",
        fingerprint: Mapping[str, Any] | None = None,
        source: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
        progress: bool = True,
        fp8: bool = False,
    ) -> None:
        """Checks everything that can be checked before data is read.

        Args:
            model: The trained model, on the device where everything is computed; it is left as it is found. Its weights
                may be sharded over ``ranks`` (``torch.distributed.fsdp.fully_shard``), without ``compile``;
                a rank that fails in the middle of a pass then leaves the others waiting until the group's timeout.
            loss: ``loss(model, batch) -> (batch,)``, lower is better. A store knows it by its name and by the arguments
                that ``functools.partial`` fixed; what else decides it belongs in ``fingerprint``.
            layers: As in ``find_layers``.
            include_head: As in ``find_layers``.
            sparsification: Stage 1: factored, ``TYPE-DIM*DIM``, or identity.
            projection: Stage 2: flat, ``TYPE-DIM``, or identity.
            hessian: ``eFIM`` or ``Identity``.
            target: ``target(model, batch) -> (batch,)``, higher is better, for queries; None for minus the loss.
            store: Folder of the gradient store; None keeps the rows in memory.
            dtype: Of the stored numbers: float32, bfloat16, float16, int8 or fp8 (`grass_lib.store.formats`), as a name
                or a type of PyTorch's. What ``grass store compress`` made can be asked whatever is given here.
            seed: Of the random maps.
            device: None for that of the model.
            masks: For selective types: ``{"layer/output": Mask, "layer/input": Mask}``.
            matrices: Instead of drawn ones, as in ``FactoredGradients``.
            backend: Of stage 2, as in ``build_projector``.
            shard_size: Samples per shard, a multiple of the batch size; None for the largest by a power of two up to
                1,024 samples and 256 MiB (or that of the store that is there).
            deterministic: Asks for deterministic kernels while caching on a GPU, so that a run that was killed ends
                with the same bits; attention then takes a little longer.
            compile: Compiles the pass over the training set, and records it on a GPU; ``"blocks"`` compiles one block
                of a model of many equal ones and records nothing, for large models.
            precision: ``"mixed"`` sums and multiplies in float32 and decomposes in float64; the other two do everything
                in one type. On an MLP with 2,000 digits and 256 or 512 features per layer, the largest error over the
                largest score, against ``"float64"``, is at most 7e-6, 3e-4 and 3e-3 at a damping of 1e-2, 1e-4 and
                1e-7; that of ``"float32"`` is 3e-4, 5e-2 and more than 2.
            fingerprint: What else decides the rows, above all the data's hash; JSON values. Without it a store tells
                training sets apart by their first samples, and by 64 from the first to the last one where the loader is
                a list of batches, or reads a data set in its order without workers.
            source: What rebuilds the store.
            ranks: ``Ranks.joined()`` where several processes with the same arguments share the work and a store's
                folder. Each caches the shards that leave its number, owns every world-th layer's curvature and scores
                its shards. :meth:`cache` and whatever scores are then called by all of them, and give the same on all.
            progress: Shows bars for work that lasts more than 3 s.
            fp8: Runs the products of all linear layers in the model's blocks in FP8, of training samples and queries,
                as in ``FactoredGradients``. Its stores are never mixed with others.

        Raises:
            SpecError: The compression does not fit.
            UsageError: Another argument does not fit.
        """
        self.hessian = parse_hessian(hessian)
        if precision not in PRECISIONS:
            raise UsageError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
        if target is not None:
            check_output(target, "target", "higher is better")
        check_compile(compile, deterministic)
        self._ranks = Ranks() if ranks is None else ranks
        if is_sharded(model) and (self._ranks.alone or compile):
            raise UsageError(
                "the model's weights are sharded over ranks; expected ranks=Ranks.joined(), and compile=False"
            )
        if store is None and not self._ranks.alone:
            raise UsageError(f"store is None with {self._ranks.world} ranks; expected a folder that all of them see")
        self._dtypes = PRECISIONS[precision]
        self._gradients = FactoredGradients(
            model,
            loss,
            layers=layers,
            include_head=include_head,
            sparsification=sparsification,
            projection=projection,
            seed=seed,
            device=device,
            masks=masks,
            matrices=matrices,
            backend=backend,
            compile=compile,
            dtype=torch.float64 if any(own.dtype == torch.float64 for own in model.parameters()) else torch.float32,
            fp8=fp8,
        )
        self.spec, self.sizes, self.k = self._gradients.spec, self._gradients.sizes, self._gradients.k
        self.include_head, self.device = self._gradients.include_head, self._gradients.device
        dtype = parse_dtype(dtype)
        self.dtype, self.deterministic, self._progress = dtype, deterministic, progress and self._ranks.rank == 0
        self._kept = KeptStore(
            self._gradients,
            path=store,
            dtype=dtype,
            shard_size=shard_size,
            settings={"seed": seed, "deterministic": deterministic, "compiled": compile},
            masks=masks,
            matrices=matrices,
            given=fingerprint,
            source=source,
        )
        self.timings: dict[str, float] = dict.fromkeys((*_SECONDS, "samples"), 0.0)
        self.residuals: dict[str, float] = {}
        self._filler = StoreFiller(
            self._gradients,
            self._kept,
            self.timings,
            sums=self._dtypes[0] if self.hessian == "eFIM" else None,
            deterministic=deterministic,
            ranks=self._ranks,
            progress=self._progress,
        )
        self._scorer = Scorer(self._gradients, target, self._dtypes[0], self.timings, self._progress, self._ranks)

    @property
    def store(self) -> Store:
        """The complete store; raises as :meth:`attribute` does."""
        return self._kept.complete()

    @property
    def stored_bytes(self) -> int:
        """Bytes of the complete store."""
        return self.store.stored_bytes

    @property
    def backend(self) -> str:
        """Who computes stage 2: ``none`` where there is no stage 2."""
        return ", ".join(sorted(set(self._gradients.backends.values()) - {"none"})) or "none"

    def cache(
        self, loader: Iterable[Batch], *, n_samples: int | None = None, worker: int = 0, n_workers: int = 1
    ) -> None:
        """Computes the gradients of the training set, or the shards of them that are missing.

        In memory, another training set (see ``fingerprint``) takes the place of the one before; a folder refuses it.

        Args:
            loader: Yields batches of one size (the last may be smaller) in a fixed order; it is walked once.
            n_samples: Number of training samples, where the loader does not say it.
            worker: Number of this worker, which writes the shards that leave it modulo ``n_workers``.
            n_workers: Number of workers that share the store, each walking the whole loader.

        Raises:
            UsageError: The loader shuffles, its length is not known, or batches do not fit the shards.
            GrassError: A gradient is not finite.
            StoreError: The folder holds a store of something else, or cannot be written.
        """
        self._filler(loader, n_samples, worker, n_workers)

    def warm_up(self, batch: Batch) -> None:
        """Compiles and records the step of :meth:`cache`, which then begins at full speed; nothing is kept.

        Args:
            batch: Of the shape of those that will be cached. With ``ranks`` all of them give one.
        """
        self._filler.warm_up(batch)

    def attribute(self, query_loader: Iterable[Batch], damping: Damping = 0.1) -> Tensor:
        """Scores of all training samples for all queries.

        Args:
            query_loader: Yields query batches.
            damping: Times the mean eigenvalue; one value, or a grid that costs one pass. Hessian "Identity" ignores it.

        Returns:
            ``(n_train, n_query)``, or ``(n_damping, n_train, n_query)`` for a grid, on the device.

        Raises:
            UsageError: The store is not complete, the loader is empty or a damping value is out of range.
            GrassError: A query's gradient is not finite.
            StoreError: A shard is not of the size or header that it was written with, or cannot be read; checksums are
                compared by ``GradientStore.verify``.
        """
        grid, single = self._grid(damping)
        store, parts = self._kept.complete(), []
        for count, prepared in self._scorer.blocks(store, self._ready_bases(store), query_loader, grid):
            scores = torch.zeros(len(grid), store.n_samples, count, dtype=self._dtypes[0], device=self.device)
            with self._ranks.together("scoring"):
                for samples, found in self._scorer.shards(store, prepared):
                    scores[:, samples.start : samples.stop] = found.view(len(found), len(grid), count).movedim(1, 0)
            parts.append(self._ranks.add(scores))
        result = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return result[0] if single else result

    def self_influence(self, damping: Damping = 0.1) -> Tensor:
        """``sum_l g_il . (F_l + damping * tr(F_l) / k_l * I)^-1 . g_il`` of every training sample.

        Args:
            damping: As in :meth:`attribute`.

        Returns:
            ``(n_train,)``, or ``(n_damping, n_train)`` for a grid, on the device.

        Raises:
            UsageError: The store is not complete, or a damping value is out of range.
            StoreError: A shard is not of the size or header that it was written with, or cannot be read; checksums are
                compared by ``GradientStore.verify``.
        """
        grid, single = self._grid(damping)
        store = self._kept.complete()
        result = self._scorer.self_influence(store, self._ready_bases(store), grid)
        return result[0] if single else result

    def topk(self, query_loader: Iterable[Batch], k: int = 10, damping: float = 0.1) -> TopK:
        """The training samples that help and harm each query most; scores are not kept.

        Args:
            query_loader: Yields query batches.
            k: How many at each end.
            damping: One value, as in :meth:`attribute`.

        Returns:
            What ``topk`` gives for the scores of :meth:`attribute`.

        Raises:
            UsageError: The store is not complete, the loader is empty, or k or the damping is out of range.
            GrassError: A query's gradient is not finite.
            StoreError: A shard is not of the size or header that it was written with, or cannot be read; checksums are
                compared by ``GradientStore.verify``.
        """
        grid, single = self._grid(damping)
        if not single:
            raise UsageError(f"damping is a grid of {len(grid)} values; topk ranks by one value, for example 0.1")
        store, found = self._kept.complete(), []
        k = checked_k(k, store.n_samples)
        for count, prepared in self._scorer.blocks(store, self._ready_bases(store), query_loader, grid):
            merge = TopKMerge(k)
            with self._ranks.together("scoring"):
                for samples, scores in self._scorer.shards(store, prepared):
                    merge.update(scores, samples.start)
            found.append(merge.result_of(self._ranks, count, self._dtypes[0], self.device))
        return TopK(torch.cat([part.indices for part in found]), torch.cat([part.scores for part in found]))

    def _grid(self, damping: Damping) -> tuple[list[float], bool]:
        grid, single = damping_grid(damping)
        if self.hessian == "Identity" and not single:
            raise UsageError(f"damping is a grid of {len(grid)} values, but hessian 'Identity' has none; leave it out")
        return grid, single

    def _ready_bases(self, store: Store) -> dict[str, LayerBasis] | None:
        """Eigenvectors of this rank's layers, computed at first use; None for hessian "Identity"."""
        if self.hessian == "Identity":
            return None
        if self._filler.bases is None:
            own = [name for place, name in enumerate(store.layers) if self._ranks.owns(place)]
            with (
                self._ranks.together("decomposing the curvature"),
                clocked(self.timings, "curvature", self.device),
                exact_products(),
            ):
                keep, solve = self._dtypes
                # The sums are used up on the way, and so are not there for a second attempt.
                curvature, self._filler.curvature = self._filler.curvature, None
                bases = decompose(store, own, curvature, self.device, solve=solve, keep=keep)
            self._filler.bases = bases
            told = self._ranks.tell({name: basis.residual for name, basis in bases.items()})
            found = {name: value for part in told for name, value in part.items()}
            self.residuals = {name: found[name] for name in store.layers}
        return self._filler.bases

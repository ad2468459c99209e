"""Sums, bases and preconditioned queries of one layer, against float64 linear algebra."""

import logging

import pytest
import torch

from grass_lib.attribution.curvature import Curvature, RowBlock, block_rows, stream_curvature
from grass_lib.attribution.preconditioner import decompose, dual_basis, primal_basis, primal_layers, warn_unresolved
from grass_lib.errors import GrassError
from grass_lib.precision import exact_products
from grass_lib.store import MemoryStore

CPU = torch.device("cpu")


def rows_of(n, k, rank=None, dtype=torch.float64, seed=0):
    """Rows whose covariance has eigenvalues from 1 down to 1e-4."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, k, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, k, dtype=torch.float64)
    if rank is not None:
        rows = rows @ torch.diag((torch.arange(k) < rank).double())
    return rows.to(dtype)


def direct(rows, queries, damping):
    """``(F + d tr(F)/k I)^-1 q``."""
    rows, queries = rows.double(), queries.double()
    k = rows.shape[1]
    fisher = rows.mT @ rows / len(rows)
    return torch.linalg.solve(fisher + damping * fisher.trace() / k * torch.eye(k, dtype=torch.float64), queries.mT).mT


def basis_of(rows, form, keep=torch.float64):
    if form == "dual":
        return dual_basis("layer", rows, keep=keep)
    return primal_basis("layer", rows.mT @ rows, len(rows), dtype=torch.float64, keep=keep)


@pytest.mark.parametrize(("n", "k", "rank"), [(50, 12, None), (12, 50, None), (20, 20, None), (40, 30, 7), (30, 40, 7)])
@pytest.mark.parametrize("form", ["primal", "dual"])
def test_scores_are_those_of_the_inverse(form, n, k, rank):
    rows, queries = rows_of(n, k, rank), torch.randn(5, k, dtype=torch.float64)
    basis, grid = basis_of(rows, form), [1e-6, 1e-2, 1.0]
    found = basis.precondition(queries, grid)
    assert found.shape == (3, 5, k)
    for place, damping in enumerate(grid):
        wanted = rows @ direct(rows, queries, damping).mT
        torch.testing.assert_close(rows @ found[place].mT, wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))
        own = (rows * direct(rows, rows, damping)).sum(dim=1)
        torch.testing.assert_close(basis.self_influence(rows, grid)[place], own, rtol=1e-8, atol=1e-9)
    assert basis.mean == pytest.approx(float(rows.square().sum()) / n / k)
    assert basis.residual < 1e-13
    assert basis.vectors.shape[1] == (k if form == "primal" else min(n, k if rank is None else rank))


def test_a_layer_of_zeros_has_no_directions():
    for basis in (basis_of(torch.zeros(6, 4), "dual"), basis_of(torch.zeros(6, 4), "primal")):
        assert basis.mean == 0.0
        assert torch.equal(basis.precondition(torch.ones(2, 4).double(), [0.1]), torch.zeros(1, 2, 4).double())
        assert torch.equal(basis.self_influence(torch.zeros(6, 4).double(), [0.1]), torch.zeros(1, 6).double())


def test_float32_decompositions_say_how_exact_they_are():
    rows = rows_of(60, 40, dtype=torch.float32)
    basis = primal_basis("layer", rows.mT @ rows, 60, dtype=torch.float32, keep=torch.float32)
    assert 1e-9 < basis.residual < 1e-5
    assert basis.vectors.dtype == torch.float32
    found, wanted = rows @ basis.precondition(rows, [0.1])[0].mT, rows.double() @ direct(rows, rows, 0.1).mT
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_overflow_and_damping_below_rounding_are_told(caplog):
    with pytest.raises(GrassError, match=r"layer overflows torch\.float32"):
        primal_basis("layer", torch.full((2, 2), torch.inf), 3, dtype=torch.float32, keep=torch.float32)
    rows = rows_of(60, 40)
    narrow = [basis_of(rows, "primal", torch.float32)]
    with caplog.at_level(logging.INFO):
        warn_unresolved([basis_of(rows, "primal"), basis_of(rows, "dual")], [1e-7])
        warn_unresolved(narrow, [0.1])
        assert not caplog.records
        warn_unresolved(narrow, [1e-8])
        warn_unresolved(narrow, [1e-8, 0.1])  # some value of a grid may be too small; the caller chooses
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert all(record.getMessage().startswith("A damping of 1e-08 is") for record in caplog.records)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_grow_with_the_store_as_they_are_read_from_it(dtype, monkeypatch):
    """The same bits, in blocks that cut both batches and shards."""
    sizes, n = {"a": 12, "b": 5, "unread": 40}, 50
    monkeypatch.setattr("grass_lib.attribution.curvature._BLOCK_BYTES", 9 * 57 * dtype.itemsize)
    rows = {name: rows_of(n, size, dtype=torch.float32) for name, size in sizes.items()}
    store = MemoryStore(layers=sizes, n_samples=n, shard_size=20, dtype=dtype)
    block, grown = RowBlock(sizes, 20, dtype, CPU), Curvature({"a": 12, "b": 5}, CPU)
    assert block.rows == 8
    for shard in range(3):
        samples = store.shard_rows(shard)
        store.write(shard, {name: part[samples.start : samples.stop].to(dtype) for name, part in rows.items()})
        first = 0
        while first < len(samples):
            first = block.append({name: part[samples.start : samples.stop] for name, part in rows.items()}, first)
            for name, part in block.parts():
                if name in grown.sums:
                    grown.add(name, part)
            block.filled = 0
    read = stream_curvature(store, ["a", "b"], CPU)
    for name in ("a", "b"):
        assert torch.equal(read.sums[name], grown.sums[name])
        exact = rows[name].to(dtype).double()
        torch.testing.assert_close(read.sums[name].double(), exact.mT @ exact, rtol=1e-5, atol=1e-6)
    wide = stream_curvature(store, ["a"], CPU, torch.float64).sums["a"]
    exact = rows["a"].to(dtype).double()
    torch.testing.assert_close(wide, exact.mT @ exact, rtol=1e-13, atol=1e-13)
    assert primal_layers(store) == sizes
    assert primal_layers(MemoryStore(layers=sizes, n_samples=20)) == {"a": 12, "b": 5}


@pytest.mark.parametrize(
    "device",
    [
        CPU,
        pytest.param(
            torch.device("cuda"),
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize(("held", "passes"), [(1, 5), (2 * 20 * 30 * 4, 3), (2**30, 1)])
def test_a_store_is_decomposed_layer_by_layer_whatever_is_read_together(device, held, passes, monkeypatch):
    sizes, n = {"d0": 30, "p0": 7, "d1": 30, "d2": 30, "p1": 20, "d3": 30, "d4": 30}, 20
    rows = {name: rows_of(n, size, dtype=torch.float32, seed=place) for place, (name, size) in enumerate(sizes.items())}
    store = MemoryStore(layers=sizes, n_samples=n, shard_size=8)
    for shard in range(store.n_shards):
        samples = store.shard_rows(shard)
        store.write(shard, {name: part[samples.start : samples.stop] for name, part in rows.items()})
    walks, stream = [], MemoryStore.stream_rows

    def counted(self, *, layers, **more):
        walks.append([*layers])
        return stream(self, layers=layers, **more)

    monkeypatch.setattr(MemoryStore, "stream_rows", counted)
    monkeypatch.setattr("grass_lib.attribution.preconditioner._ROW_BYTES", held)
    bases = decompose(store, list(sizes), None, device, solve=torch.float64, keep=torch.float64)
    assert list(bases) == list(sizes)
    assert len(walks) == 1 + passes  # the sums first
    for name, part in rows.items():
        alone = (
            primal_basis(name, part.double().mT @ part.double(), n, dtype=torch.float64, keep=torch.float64)
            if sizes[name] <= n
            else dual_basis(name, part, keep=torch.float64)
        )
        queries = rows_of(3, sizes[name])
        found = part.double() @ bases[name].precondition(queries.to(device), [0.1])[0].mT.cpu()
        wanted = part.double() @ alone.precondition(queries, [0.1])[0].mT
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_blocks_are_bounded():
    assert block_rows(4, 1000) == 1000
    assert block_rows(2**20, 1000) == 128
    assert block_rows(3 * 2**20, 1000) == 32
    assert block_rows(2**30, 1000) == 1


def test_fast_products_are_off_only_inside():
    torch.set_float32_matmul_precision("high")
    try:
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores_add_up_exact_products(dtype):
    rows = rows_of(300, 64, dtype=torch.float32).to(dtype).cuda()
    sums = Curvature({"a": 64}, rows.device)
    sums.add("a", rows)
    exact = rows.double().mT @ rows.double()
    assert float((sums.sums["a"].double() - exact).abs().max() / exact.abs().max()) < 1e-6

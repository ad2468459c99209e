"""The packed table, walked as the GPU walks it: right sums, no destination in two groups, own banks."""

import pytest
import torch

from grass_lib.errors import UsageError
from grass_lib.kernels.sjlt_table import Layout, Table, build_table


def _walk(table: Table, x: torch.Tensor, k: int) -> torch.Tensor:
    """Adds every entry as the kernel does and checks, tile by tile, what keeps the kernel free of races."""
    layout = table.layout
    out = torch.zeros(x.shape[0], k, dtype=torch.float64)
    entries = table.entries.to(torch.int64) & 0xFFFFFFFF
    spare = layout.sum_rows - layout.lanes
    for number in range(table.passes):
        sums = torch.zeros(x.shape[0], layout.sum_rows, dtype=torch.float64)
        for tile in range(table.tiles):
            begin, end = (int(table.offsets[number, tile + i]) for i in (0, 1))
            assert end - begin <= table.longest
            block = entries[begin:end]
            target, column, sign = block >> 16, block & 0x7FFF, (block >> 15) & 1
            group = torch.arange(layout.groups)[None, :, None].expand_as(block)
            assert ((target % layout.lanes) == (group % layout.lanes)).all()
            real = target < spare
            owners = torch.stack([target[real], group[real]], 1).unique(dim=0)
            assert owners[:, 0].unique().numel() == owners.shape[0]
            source = (column + tile * layout.tile)[real]
            assert (source < x.shape[1]).all()
            sums.index_add_(1, target[real], x[:, source] * (1 - 2 * sign[real]).to(torch.float64))
        here = min(layout.k_pass, k - number * layout.k_pass)
        spread = sums[:, : layout.k_pass * layout.copies].reshape(x.shape[0], layout.k_pass, layout.copies)
        out[:, number * layout.k_pass : number * layout.k_pass + here] = spread.sum(2)[:, :here]
    return out


@pytest.mark.parametrize(
    ("p", "k", "c", "layout"),
    [
        (1000, 64, 1, Layout(8, 128, 4, 64, 1)),
        (1000, 37, 3, Layout(4, 64, 2, 37, 4)),
        (1, 5, 1, Layout(1, 64, 2, 5, 1)),
        (777, 300, 2, Layout(2, 256, 4, 110, 1)),
        (129, 1, 1, Layout(8, 128, 4, 1, 8)),
    ],
)
def test_table_gives_the_operator(p: int, k: int, c: int, layout: Layout) -> None:
    generator = torch.Generator().manual_seed(p)
    destinations = torch.randint(0, k, (p, c), generator=generator)
    negative = torch.randint(0, 2, (p, c), generator=generator).bool()
    x = torch.randn(3, p, dtype=torch.float64, generator=generator)
    matrix = torch.zeros(p, k, dtype=torch.float64)
    matrix.index_put_(
        (torch.arange(p)[:, None].expand(p, c), destinations), 1 - 2 * negative.to(torch.float64), accumulate=True
    )
    table = build_table(destinations, negative, k, layout)
    torch.testing.assert_close(_walk(table, x, k), x @ matrix, rtol=1e-12, atol=1e-12)


def test_chunks_of_tiles_give_the_same_table(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    destinations = torch.randint(0, 50, (1000, 2), generator=generator)
    negative = torch.randint(0, 2, (1000, 2), generator=generator).bool()
    layout = Layout(8, 64, 4, 50, 1)
    whole = build_table(destinations, negative, 50, layout)
    monkeypatch.setattr("grass_lib.kernels.sjlt_table._ENTRIES_AT_ONCE", 256)
    parts = build_table(destinations, negative, 50, layout)
    assert torch.equal(whole.entries, parts.entries)
    assert torch.equal(whole.offsets, parts.offsets)


@pytest.mark.parametrize("wrong", [(3, 64, 4, 10, 1), (8, 50, 4, 10, 1), (1, 64, 4, 70000, 1)])
def test_layout_refuses_what_does_not_fit(wrong: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(UsageError):
        Layout(*wrong)

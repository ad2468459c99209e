"""Triton program of the dense Gaussian projection: tiles of the matrix are drawn in registers and multiplied at once.

Imported only where Triton is (every CUDA build of PyTorch brings it). Counters and bits follow `grass_lib.rng`.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _philox(c0, c1, k0, k1):
    c0, c1 = tl.broadcast(c0, c1)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high2 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low2 = c2 * 0xCD9E8D57
        c0 = high2 ^ c1 ^ k0
        c1 = low2
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _pair(a, b):
    # Box-Muller on two words, as `grass_lib.rng.box_muller`.
    u = (a.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    turn = ((b ^ 0x80000000).to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 1.4629180792671596e-09
    radius = tl.sqrt(-2.0 * tl.log(u))
    return radius * tl.cos(turn), radius * tl.sin(turn)


@triton.jit
def _add_normal(v, numbers, total):
    return total + tl.dot(v, numbers, input_precision="tf32x3")


@triton.jit(do_not_specialize=["k0", "k1"])
def normal(  # noqa: D103
    x, row_stride, batch, p, k0, k1, out, k, chunks, chunks_a_split, batch_tiles,
    BP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    output_tile = pid // batch_tiles  # of 128
    rows = ((pid % batch_tiles) * BM + tl.arange(0, BM)).to(tl.int64)
    part = tl.program_id(1)
    first = part.to(tl.int64) * chunks_a_split
    last = tl.minimum(first + chunks_a_split, chunks)
    quads = tl.arange(0, 32)
    column = tl.arange(0, BP)
    x_rows = x + rows[:, None] * row_stride
    live = (rows < batch)[:, None]
    k0 = k0.to(tl.uint32)
    k1 = k1.to(tl.uint32)
    quad = (output_tile * 32 + quads).to(tl.uint32)[None, :]
    t0 = tl.zeros((BM, 32), dtype=tl.float32)
    t1 = tl.zeros((BM, 32), dtype=tl.float32)
    t2 = tl.zeros((BM, 32), dtype=tl.float32)
    t3 = tl.zeros((BM, 32), dtype=tl.float32)
    for chunk in range(first, last):
        columns = column.to(tl.int64) + chunk * BP
        v = tl.load(x_rows + columns[None, :], mask=live & (columns < p)[None, :], other=0.0).to(tl.float32)
        w0, w1, w2, w3 = _philox(columns.to(tl.uint32)[:, None], quad, k0, k1)
        n0, n1 = _pair(w0, w1)
        n2, n3 = _pair(w2, w3)
        t0 = _add_normal(v, n0, t0)
        t1 = _add_normal(v, n1, t1)
        t2 = _add_normal(v, n2, t2)
        t3 = _add_normal(v, n3, t3)
    outputs = output_tile * 128 + quads[None, :] * 4
    where = out + (part.to(tl.int64) * batch + rows)[:, None] * k + outputs
    tl.store(where, t0, mask=live & (outputs < k))
    tl.store(where + 1, t1, mask=live & (outputs + 1 < k))
    tl.store(where + 2, t2, mask=live & (outputs + 2 < k))
    tl.store(where + 3, t3, mask=live & (outputs + 3 < k))

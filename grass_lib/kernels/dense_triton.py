"""Triton programs of the dense projections: tiles of the matrix are drawn in registers and fed to the tensor cores.

Imported only where Triton is (every CUDA build of PyTorch brings it). Counters and bits follow `grass_lib.rng`.
"""

import triton
import triton.language as tl


@triton.jit
def _philox(c0, c1, k0, k1):  # noqa: D103
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
def _signs(word, position, TYPE: tl.constexpr):
    # Bit 1 is -1; +-1 is exact in every type.
    bit = (word[:, None] >> position[None, :]) & 1
    return (1 - 2 * bit.to(tl.int32)).to(TYPE)


@triton.jit
def _add_exact(signs, x, total, SPLIT: tl.constexpr):
    # An fp32 value is the sum of three bfloat16 values; times +-1 every product is exact.
    if SPLIT:
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(signs, low, total)
        total = tl.dot(signs, middle, total)
        total = tl.dot(signs, high, total)
    else:
        total = tl.dot(signs, x, total)
    return total


@triton.jit(do_not_specialize=["k0", "k1"])
def rademacher(
    x, row_stride, batch, p, k0, k1, out, k, chunks, chunks_a_split, batch_tiles,
    SPLIT: tl.constexpr, TYPE: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: D103
    pid = tl.program_id(0)
    outputs = (pid // batch_tiles) * BK + tl.arange(0, BK)
    rows = (pid % batch_tiles) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    first = part.to(tl.int64) * chunks_a_split
    last = tl.minimum(first + chunks_a_split, chunks)
    position = tl.arange(0, 32)
    x_rows = x + rows.to(tl.int64)[None, :] * row_stride
    live = (rows < batch)[None, :]
    k0 = k0.to(tl.uint32)
    k1 = k1.to(tl.uint32)
    counter = outputs.to(tl.uint32)
    total = tl.zeros((BK, BM), dtype=tl.float32)
    for chunk in range(first, last):
        w0, w1, w2, w3 = _philox(counter, (tl.zeros((BK,), tl.int64) + chunk).to(tl.uint32), k0, k1)
        column = position.to(tl.int64) + chunk * 128
        # Sums of 128 columns start at zero and are then added in fp32 proper: tensor cores truncate as they accumulate.
        recent = tl.zeros((BK, BM), dtype=tl.float32)
        v0 = tl.load(x_rows + column[:, None], mask=live & (column < p)[:, None], other=0.0)
        v1 = tl.load(x_rows + (column + 32)[:, None], mask=live & (column + 32 < p)[:, None], other=0.0)
        v2 = tl.load(x_rows + (column + 64)[:, None], mask=live & (column + 64 < p)[:, None], other=0.0)
        v3 = tl.load(x_rows + (column + 96)[:, None], mask=live & (column + 96 < p)[:, None], other=0.0)
        recent = _add_exact(_signs(w0, position, TYPE), v0, recent, SPLIT)
        recent = _add_exact(_signs(w1, position, TYPE), v1, recent, SPLIT)
        recent = _add_exact(_signs(w2, position, TYPE), v2, recent, SPLIT)
        recent = _add_exact(_signs(w3, position, TYPE), v3, recent, SPLIT)
        total += recent
    where = out + (part.to(tl.int64) * batch + rows.to(tl.int64))[None, :] * k + outputs[:, None]
    tl.store(where, total, mask=live & (outputs < k)[:, None])


@triton.jit
def _pair(a, b):
    # Box-Muller on two words, as `grass_lib.rng`.
    u = (a.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    v = b.to(tl.float32) * (6.283185307179586 * 2.3283064365386963e-10)
    radius = tl.sqrt(-2.0 * tl.log(u))
    return radius * tl.cos(v), radius * tl.sin(v)


@triton.jit(do_not_specialize=["k0", "k1"])
def normal(
    x, row_stride, batch, p, k0, k1, out, k, chunks, chunks_a_split, batch_tiles,
    BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip  # noqa: D103
    pid = tl.program_id(0)
    outputs = (pid // batch_tiles) * BK + tl.arange(0, BK)
    rows = (pid % batch_tiles) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    first = part.to(tl.int64) * chunks_a_split
    last = tl.minimum(first + chunks_a_split, chunks)
    quads = tl.arange(0, 16)
    x_rows = x + rows.to(tl.int64)[None, :] * row_stride
    live = (rows < batch)[None, :]
    k0 = k0.to(tl.uint32)
    k1 = k1.to(tl.uint32)
    counter = outputs.to(tl.uint32)[:, None]
    total = tl.zeros((BK, BM), dtype=tl.float32)
    for chunk in range(first, last):  # 64 columns
        quad = (quads.to(tl.int64) + chunk * 16).to(tl.uint32)[None, :]
        w0, w1, w2, w3 = _philox(counter, quad, k0, k1)
        n0, n1 = _pair(w0, w1)
        n2, n3 = _pair(w2, w3)
        column = (quads * 4).to(tl.int64) + chunk * 64
        v0 = tl.load(x_rows + column[:, None], mask=live & (column < p)[:, None], other=0.0).to(tl.float32)
        v1 = tl.load(x_rows + (column + 1)[:, None], mask=live & (column + 1 < p)[:, None], other=0.0).to(tl.float32)
        v2 = tl.load(x_rows + (column + 2)[:, None], mask=live & (column + 2 < p)[:, None], other=0.0).to(tl.float32)
        v3 = tl.load(x_rows + (column + 3)[:, None], mask=live & (column + 3 < p)[:, None], other=0.0).to(tl.float32)
        recent = tl.dot(n0, v0, input_precision="tf32x3")
        recent = tl.dot(n1, v1, recent, input_precision="tf32x3")
        recent = tl.dot(n2, v2, recent, input_precision="tf32x3")
        recent = tl.dot(n3, v3, recent, input_precision="tf32x3")
        total += recent
    where = out + (part.to(tl.int64) * batch + rows.to(tl.int64))[None, :] * k + outputs[:, None]
    tl.store(where, total, mask=live & (outputs < k)[:, None])

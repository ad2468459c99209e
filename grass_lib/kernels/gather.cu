// Mask: out[b, i] = scale * x[b, columns[i]]. Columns ascend, so neighbouring threads read neighbouring memory.
extern "C" __global__ void __launch_bounds__(256) gather(const in_t* __restrict__ x, i64 row_stride, int rows,
                                                         const i64* __restrict__ columns, i64 k, float scale,
                                                         out_t* __restrict__ out) {
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= k) return;
    i64 column = columns[i];
#pragma unroll 4
    for (int row = blockIdx.y; row < rows; row += gridDim.y)
        out[(i64)row * k + i] = narrow(widen(x[(i64)row * row_stride + column]) * scale);
}

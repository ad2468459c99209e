// Chosen entries of a product over positions: out[s, i] = sum over t of left[s, row_i + t] * right[s, base_i + place_t].
//
// GROUP neighbouring lanes share ITEMS entries and take positions in turn: neighbouring lanes read neighbouring memory,
// ITEMS independent pairs of reads are in flight for every position, and neighbouring entries, which ascend, mostly
// share their row of `left`. Sums are added in one fixed order in float32. An entry whose base is negative is a bias: its
// right factor is 1.
//
// Compile-time constants: IN (see common.cuh), THREADS, GROUP (a power of 2, at most 32), ITEMS.
struct Entry {
    int row, base;
};

extern "C" __global__ void __launch_bounds__(THREADS) sampled(const in_t* __restrict__ left, i64 left_stride,
                                                              const in_t* __restrict__ right, i64 right_stride,
                                                              const Entry* __restrict__ entries, int kept,
                                                              const int* __restrict__ places, int tokens, int samples,
                                                              float* __restrict__ out) {
    const int lane = threadIdx.x % GROUP;
    const int first = (blockIdx.x * (THREADS / GROUP) + threadIdx.x / GROUP) * ITEMS;
    // No early return: all lanes of a warp take part in the exchange below.
    Entry entry[ITEMS];
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
        entry[j].row = 0;
        entry[j].base = -1;
        if (first + j < kept) entry[j] = entries[first + j];
    }
    for (int sample = blockIdx.y; sample < samples; sample += gridDim.y) {
        const in_t* a = left + sample * left_stride;
        const in_t* b = right + sample * right_stride;
        float sum[ITEMS];
#pragma unroll
        for (int j = 0; j < ITEMS; j++) sum[j] = 0.f;
        for (int t = lane; t < tokens; t += GROUP) {
            const int place = places[t];
            float x[ITEMS], y[ITEMS];
#pragma unroll
            for (int j = 0; j < ITEMS; j++) {
                x[j] = widen(a[entry[j].row + t]);
                y[j] = entry[j].base < 0 ? 1.f : widen(b[entry[j].base + place]);
            }
#pragma unroll
            for (int j = 0; j < ITEMS; j++) sum[j] = fmaf(x[j], y[j], sum[j]);
        }
#pragma unroll
        for (int step = GROUP / 2; step > 0; step /= 2)
#pragma unroll
            for (int j = 0; j < ITEMS; j++) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], step);
#pragma unroll
        for (int j = 0; j < ITEMS; j++)
            if (lane == j % GROUP && first + j < kept) out[(i64)sample * kept + first + j] = sum[j];
    }
}

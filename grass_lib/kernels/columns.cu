// Kept columns of a matrix of 2-byte or 4-byte elements, with a column of ones behind them where ONES is set.
//
// Neighbouring threads take neighbouring kept columns, which ascend. A thread has ROWS rows in flight: the reads are
// scattered, and only many of them at a time hide the memory's latency.
//
// Compile-time constants: IN (see common.cuh), ONES, ONE (the bits of 1), THREADS, ROWS.
#if IN == 0
typedef u32 word_t;
#else
typedef u16 word_t;
#endif

extern "C" __global__ void __launch_bounds__(THREADS) columns(const word_t* __restrict__ x, i64 row_stride, int rows,
                                                              const i64* __restrict__ index, int kept,
                                                              word_t* __restrict__ out) {
    const int k = kept + ONES;
    const int wide = min(k, THREADS), lines = THREADS / wide;  // a block takes `lines` rows at a time
    const int line = threadIdx.x / wide;
    if (line >= lines) return;
    const int first = (blockIdx.x * ROWS) * lines + line;
    for (int j = threadIdx.x % wide; j < k; j += wide) {
        const bool one = ONES && j == kept;
        const i64 column = one ? 0 : index[j];
        word_t held[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int row = first + i * lines;
            if (row < rows) held[i] = one ? (word_t)ONE : x[(i64)row * row_stride + column];
        }
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const int row = first + i * lines;
            if (row < rows) out[(i64)row * k + j] = held[i];
        }
    }
}

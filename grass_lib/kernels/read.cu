// Reads n 16-byte words and keeps almost nothing: the yardstick for kernels that must read their input once.
extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* __restrict__ x, i64 n, u32* __restrict__ out) {
    u32 seen = 0;
    i64 step = (i64)gridDim.x * 512 * 8;
    for (i64 i = (i64)blockIdx.x * 512 * 8 + threadIdx.x; i < n; i += step) {
        uint4 v[8];
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = i + j * 512 < n ? x[i + j * 512] : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < 8; j++) seen ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (seen == 0x9e3779b9u) out[0] = seen;  // never true in practice, but the compiler cannot know
}

// out[i] = scale * sum over s, in ascending order, of parts[s, i]: the second half of every kernel that splits its sums.
extern "C" __global__ void __launch_bounds__(256) reduce_parts(const float* __restrict__ parts, int splits, i64 n,
                                                               float scale, out_t* __restrict__ out) {
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= n) return;
    float total = 0.f;
#pragma unroll 8
    for (int s = 0; s < splits; s++) total += parts[(i64)s * n + i];
    out[i] = narrow(total * scale);
}

// Dense sign projection on the tensor cores: parts[split, b, m] = sum over the split's columns j of sign(j, m) * x[b, j].
//
// Signs are the bits of Philox-4x32-10 with counter (j, m / 128, 0, 0): 128 outputs a call, bit m % 32 of word m / 32 % 4,
// set for +1. A thread block owns 256 outputs (one 32-bit word, so 32 outputs, a warp) and 8 * NT rows of the batch. Chunks of
// 128 columns arrive as they are and multiply with fragments made from bits by one shift and one logical operation a pair.
// An fp32 row of a chunk is scaled by a power of two to below 2^15 and cut into two halves of 11 bits each: what is lost
// is under 2^-23 of a value, less than the rounding of sums in fp32. Products with +-1 are exact.
// Columns of a product may come in any order: thread t of a quad takes 8 neighbouring columns, so that every read from
// shared memory has 16 bytes. Tensor cores truncate as they accumulate: sums of a chunk are added in fp32 proper.
//
// Compile-time constants: IN, OUT, NT.
#define COLUMNS 128
#define BATCH (8 * NT)
#define OUTPUTS 256
#define THREADS 256
#define PARTS (IN == 0 ? 2 : 1)
#define WIDTH ((int)sizeof(in_t))
#define RAW_PITCH (COLUMNS * WIDTH + 16)
#define RAW_BYTES (BATCH * RAW_PITCH)
#define CUT_PITCH (COLUMNS * 2 + 64)
#define CUT_BYTES (BATCH * CUT_PITCH)
#define WORD_BYTES (2 * 4 * COLUMNS * 4)
#define CHUNKS (RAW_PITCH / 16)
#define ONES (IN == 2 ? 0x3f803f80u : 0x3c003c00u)

__device__ __forceinline__ uint4 philox(u32 c0, u32 c1, u32 k0, u32 k1) {
    u32 c2 = 0, c3 = 0;
#pragma unroll
    for (int i = 0; i < 10; i++) {
        u32 high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        u32 high2 = __umulhi(c2, 0xCD9E8D57u), low2 = c2 * 0xCD9E8D57u;
        c0 = high2 ^ c1 ^ k0;
        c1 = low2;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

__device__ __forceinline__ u16 half_of(float v) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return h;
}
__device__ __forceinline__ float float_of(u16 h) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(h));
    return v;
}

__device__ __forceinline__ void multiply(float* c, const u32* a, u32 b0, u32 b1) {
    asm volatile(
#if IN != 2
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) rademacher(
    const in_t* __restrict__ x, i64 row_stride, int rows, i64 p, u32 key0, u32 key1, float* __restrict__ parts, int k,
    int chunks, int chunks_a_split, int output_tiles) {
    extern __shared__ __align__(16) unsigned char memory[];
    unsigned char* raw = memory;                                        // two buffers, as in memory
    unsigned char* cut = raw + 2 * RAW_BYTES;                           // two buffers of PARTS, cut
    u32* words = (u32*)(cut + 2 * PARTS * CUT_BYTES);                   // two buffers of (2, 4, COLUMNS)
    float* back = (float*)(words + 2 * (WORD_BYTES / 4));               // two buffers: a row's scale undone
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3;
    const int output_tile = blockIdx.x % output_tiles, first_row = blockIdx.x / output_tiles * BATCH;
    const int begin = blockIdx.y * chunks_a_split, end = min(chunks, begin + chunks_a_split);

    auto fetch = [&](int chunk) {
        if (chunk < end)
            for (int i = tid; i < BATCH * CHUNKS; i += THREADS) {
                int row = i / CHUNKS, piece = i % CHUNKS;
                bool live = first_row + row < rows;
                const unsigned char* start = (const unsigned char*)(x + (i64)(live ? first_row + row : 0) * row_stride);
                const unsigned char* stop = start + p * WIDTH;
                const unsigned char* from =
                    (const unsigned char*)((u64)(start + (i64)chunk * COLUMNS * WIDTH) & ~(u64)15) + 16 * piece;
                i64 left = (i64)(stop - from);
                int bytes = live ? (int)max((i64)0, min((i64)16, left)) : 0;
                copy16(shared_address(raw + (chunk & 1) * RAW_BYTES + row * RAW_PITCH + 16 * piece),
                       bytes > 0 ? from : (const unsigned char*)((u64)start & ~(u64)15), bytes);
            }
        copies_commit();
    };
    auto prepare = [&](int chunk) {
        if (chunk >= end) return;
        // Inverted: in a fragment a set bit is a minus.
        u32* to_words = words + (chunk & 1) * (WORD_BYTES / 4);
        int column = tid & (COLUMNS - 1), tile = tid / COLUMNS;
        uint4 w = philox((u32)chunk * COLUMNS + column, (u32)(output_tile * 2 + tile), key0, key1);
        to_words += tile * 4 * COLUMNS + column;
        to_words[0] = ~w.x;
        to_words[COLUMNS] = ~w.y;
        to_words[2 * COLUMNS] = ~w.z;
        to_words[3 * COLUMNS] = ~w.w;
        unsigned char* to = cut + (chunk & 1) * PARTS * CUT_BYTES;
#pragma unroll
        for (int row = warp; row < BATCH; row += 8) {
            int live = min(first_row + row, rows - 1);
            int shift = (int)((u64)(x + (i64)live * row_stride) & 15) / WIDTH;
            const in_t* from = (const in_t*)(raw + (chunk & 1) * RAW_BYTES + row * RAW_PITCH) + shift;
            u16* out = (u16*)(to + row * CUT_PITCH);
#if IN == 0
            float v[COLUMNS / 32];
            u32 largest = 0;
#pragma unroll
            for (int i = 0; i < COLUMNS / 32; i++) {
                v[i] = from[i * 32 + lane];
                largest = max(largest, __float_as_uint(v[i]) & 0x7fffffffu);
            }
            int exponent = min(253, 268 - (int)(__reduce_max_sync(0xffffffffu, largest) >> 23));
            float scale = __uint_as_float((u32)exponent << 23);
            if (lane == 0) back[(chunk & 1) * BATCH + row] = __uint_as_float((u32)(254 - exponent) << 23);
#pragma unroll
            for (int i = 0; i < COLUMNS / 32; i++) {
                float scaled = v[i] * scale;
                u16 high = half_of(scaled);
                out[i * 32 + lane] = high;
                out[i * 32 + lane + CUT_BYTES / 2] = half_of(scaled - float_of(high));
            }
#else
#pragma unroll
            for (int i = 0; i < COLUMNS / 32; i++) out[i * 32 + lane] = from[i * 32 + lane];
#endif
        }
    };

    float total[2][NT][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int q = 0; q < 4; q++) total[i][n][q] = 0.f;

    auto compute = [&](int chunk) {
        float recent[2][NT][4];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int q = 0; q < 4; q++) recent[i][n][q] = 0.f;
        const uint4* mine = (const uint4*)(words + (chunk & 1) * (WORD_BYTES / 4) + warp * COLUMNS);
        const unsigned char* from = cut + (chunk & 1) * PARTS * CUT_BYTES + g * CUT_PITCH + 16 * t;
#pragma unroll
        for (int s = 0; s < COLUMNS / 32; s++) {
            u32 a[2][2][4];  // (16 columns, 16 outputs, fragment)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint4 w = mine[s * 8 + t * 2 + h];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    u32 first = __byte_perm(w.x, w.y, i ? 0x7632 : 0x5410);
                    u32 second = __byte_perm(w.z, w.w, i ? 0x7632 : 0x5410);
                    a[h][i][0] = ((first << (15 - g)) & 0x80008000u) | ONES;
                    a[h][i][1] = ((first << (7 - g)) & 0x80008000u) | ONES;
                    a[h][i][2] = ((second << (15 - g)) & 0x80008000u) | ONES;
                    a[h][i][3] = ((second << (7 - g)) & 0x80008000u) | ONES;
                }
            }
#pragma unroll
            for (int part = PARTS - 1; part >= 0; part--)
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    uint4 b = *(const uint4*)(from + part * CUT_BYTES + n * 8 * CUT_PITCH + s * 64);
                    multiply(recent[0][n], a[0][0], b.x, b.y);
                    multiply(recent[1][n], a[0][1], b.x, b.y);
                    multiply(recent[0][n], a[1][0], b.z, b.w);
                    multiply(recent[1][n], a[1][1], b.z, b.w);
                }
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int q = 0; q < 4; q++) {
#if IN == 0
                    total[i][n][q] += recent[i][n][q] * back[(chunk & 1) * BATCH + n * 8 + t * 2 + (q & 1)];
#else
                    total[i][n][q] += recent[i][n][q];
#endif
                }
    };

    fetch(begin);
    copies_wait<0>();
    __syncthreads();
    fetch(begin + 1);
    prepare(begin);
    for (int chunk = begin; chunk < end; chunk++) {
        copies_wait<0>();
        __syncthreads();
        fetch(chunk + 2);
        // Half of the warps prepare while the other half multiplies.
        if (warp < 4) prepare(chunk + 1);
        compute(chunk);
        if (warp >= 4) prepare(chunk + 1);
    }

#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int q = 0; q < 4; q++) {
                int output = output_tile * OUTPUTS + warp * 32 + i * 16 + g + (q >> 1) * 8;
                int row = first_row + n * 8 + t * 2 + (q & 1);
                if (output < k && row < rows) parts[((i64)blockIdx.y * rows + row) * k + output] = total[i][n][q];
            }
}

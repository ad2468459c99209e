// Blocked Hadamard transform: out[b, i] = scale * sum over blocks of +-(H D x_block)[rows[block, i]], H of entries +-1.
//
// A thread block owns V rows of the batch and walks super tiles of 2^S values, each 2^(S - M) blocks of 2^M. A value's V
// rows lie side by side in shared memory. The transform is three or four passes of radix 2^W held in registers; between
// passes the values go through shared memory at positions swizzled so that each pass touches all banks. Thread t adds
// its outputs t % 2^M, t % 2^M + THREADS, ... in registers and in a fixed order.
// Blocks above 2^LIMIT are folded: Q = 2^(FULL - M) sub-transforms of signed sums, one for each value of blockIdx.y.
//
// Compile-time constants: IN, OUT, M (transform), FULL (block, M <= FULL), S (super tile, S >= M), V, THREADS,
// W0, W1, W2, W3 (pass widths, sum M), SLICE (outputs held by a thread); runs of THREADS * SLICE outputs lie along blockIdx.z.
#define TILE (1 << S)
#define SIZE (1 << M)
#define BLOCKS_A_TILE (1 << (S - M))
#define FOLDS (1 << (FULL - M))
#define MASK (32 / V - 1)
// A picked row and, in the highest bit, the sign of what is picked.
#if FULL < 16
typedef u16 pick_t;
#define PICK_SIGN(pick) ((u32)((pick) & 0x8000) << 16)
#define PICK_ROW(pick) ((pick) & 0x7fff)
#else
typedef u32 pick_t;
#define PICK_SIGN(pick) ((pick) & 0x80000000u)
#define PICK_ROW(pick) ((int)((pick) & 0x7fffffff))
#endif

struct __align__(4 * V) vec { float v[V]; };

__device__ __forceinline__ int place(int i) { return i ^ ((i >> 4) & MASK); }

template <int W>
__device__ __forceinline__ void butterflies(vec* a) {
#pragma unroll
    for (int half = 1; half < (1 << W); half *= 2)
#pragma unroll
        for (int i = 0; i < (1 << W); i++)
            if (!(i & half))
#pragma unroll
                for (int r = 0; r < V; r++) {
                    float x = a[i].v[r], y = a[i + half].v[r];
                    a[i].v[r] = x + y;
                    a[i + half].v[r] = x - y;
                }
}

// One pass of radix 2^W over index bits [LOW, LOW + W), in place.
template <int W, int LOW>
__device__ __forceinline__ void inner_pass(vec* tile) {
    __syncthreads();
    if (W > 0)
        for (int item = threadIdx.x; item < (TILE >> W); item += THREADS) {
            int base = ((item >> LOW) << (LOW + W)) | (item & ((1 << LOW) - 1));
            vec a[1 << W];
#pragma unroll
            for (int j = 0; j < (1 << W); j++) a[j] = tile[place(base + (j << LOW))];
            butterflies<W>(a);
#pragma unroll
            for (int j = 0; j < (1 << W); j++) tile[place(base + (j << LOW))] = a[j];
        }
}

extern "C" __global__ void __launch_bounds__(THREADS) fjlt(
    const in_t* __restrict__ x, i64 row_stride, int rows, i64 p,  // (rows, p), unit stride in a row
    const u32* __restrict__ signs,                                // (blocks * 2^FULL / 32) bits: 1 is minus
    const pick_t* __restrict__ picked,                            // (blocks, k): which value of a block is output i
    void* __restrict__ out, int direct, float scale,              // direct: (rows, k), else (splits * FOLDS, rows, k)
    int k, int blocks, int tiles, int tiles_a_split, int row_groups) {
    extern __shared__ __align__(16) unsigned char memory[];
    vec* tile = (vec*)memory;
    const int tid = threadIdx.x;
    const int first_row = blockIdx.x % row_groups * V, split = blockIdx.x / row_groups;
    const int fold = blockIdx.y, slice = blockIdx.z * SLICE * THREADS;
    const int t_begin = split * tiles_a_split, t_end = min(tiles, t_begin + tiles_a_split);

    // With fewer outputs than threads, several threads add different blocks into one output; they are joined at the end.
    const int OWNERS = SIZE < THREADS ? THREADS / SIZE : 1;
    const int mine = SIZE < THREADS ? tid % SIZE : tid, owner = SIZE < THREADS ? tid / SIZE : 0;
    vec sum[SLICE];
#pragma unroll
    for (int i = 0; i < SLICE; i++)
#pragma unroll
        for (int r = 0; r < V; r++) sum[i].v[r] = 0.f;

    const in_t* row[V];
#pragma unroll
    for (int r = 0; r < V; r++) row[r] = x + (i64)min(first_row + r, rows - 1) * row_stride;

    for (int t = t_begin; t < t_end; t++) {
        const i64 start = (i64)t * TILE * FOLDS;
        const int LOW0 = M - W0;
        for (int item = tid; item < (TILE >> W0); item += THREADS) {
            int base = ((item >> LOW0) << M) | (item & ((1 << LOW0) - 1));
            vec a[1 << W0];
#pragma unroll
            for (int j = 0; j < (1 << W0); j++) {
#pragma unroll
                for (int r = 0; r < V; r++) a[j].v[r] = 0.f;
#pragma unroll
                for (int part = 0; part < FOLDS; part++) {
                    i64 at = start + part * SIZE + base + (j << LOW0);
                    if (at < p) {
                        // The sign of the fold's own Hadamard row joins the random sign.
                        u32 minus = (signs[at >> 5] >> (at & 31)) ^ (u32)__popc(part & fold);
#pragma unroll
                        for (int r = 0; r < V; r++) {
                            float value = __uint_as_float(__float_as_uint(widen(row[r][at])) ^ (minus << 31));
                            a[j].v[r] = FOLDS == 1 ? value : a[j].v[r] + value;
                        }
                    }
                }
            }
            butterflies<W0>(a);
#pragma unroll
            for (int j = 0; j < (1 << W0); j++) tile[place(base + (j << LOW0))] = a[j];
        }
        inner_pass<W1, W2 + W3>(tile);
        if (W2 > 0) inner_pass<W2, W3>(tile);
        if (W3 > 0) inner_pass<W3, 0>(tile);
        __syncthreads();
        for (int n = owner; n < BLOCKS_A_TILE; n += OWNERS) {
            i64 block = (i64)t * BLOCKS_A_TILE + n;
            if (block < blocks) {
                const pick_t* pick = picked + block * k;
#pragma unroll
                for (int i = 0; i < SLICE; i++) {
                    int output = slice + mine + i * THREADS;
                    if (output < k) {
                        const pick_t taken = pick[output];
                        const int from = PICK_ROW(taken);
                        const u32 minus = PICK_SIGN(taken);
                        if (FOLDS == 1 || (from >> M) == fold) {
                            vec value = tile[place(n * SIZE + (from & (SIZE - 1)))];
#pragma unroll
                            for (int r = 0; r < V; r++)
                                sum[i].v[r] += __uint_as_float(__float_as_uint(value.v[r]) ^ minus);
                        }
                    }
                }
            }
        }
        __syncthreads();
    }

    if (OWNERS > 1) {  // here SLICE is 1
        tile[tid] = sum[0];
        __syncthreads();
        if (owner == 0)
            for (int other = 1; other < OWNERS; other++)
#pragma unroll
                for (int r = 0; r < V; r++) sum[0].v[r] += tile[other * SIZE + mine].v[r];
    }
    if (owner == 0)
#pragma unroll
        for (int i = 0; i < SLICE; i++) {
            int output = slice + mine + i * THREADS;
            if (output < k)
#pragma unroll
                for (int r = 0; r < V; r++)
                    if (first_row + r < rows) {
                        i64 to = ((i64)(split * FOLDS + fold) * rows + first_row + r) * k + output;
                        if (direct) ((out_t*)out)[to] = narrow(sum[i].v[r] * scale);
                        else ((float*)out)[to] = sum[i].v[r];
                    }
        }
}

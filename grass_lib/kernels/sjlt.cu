// Sparse Johnson-Lindenstrauss transform: out[b, d] = scale * sum over entries (column j -> d) of +-x[b, j].
//
// One thread block owns R rows of the batch and a run of column tiles; its R x KV sums live in shared memory. A warp is
// G = 32 / R lane groups of R rows. Inside a tile the entries are sorted so that no destination belongs to two lane
// groups: a sum is a plain read-modify-write in a fixed order, without atomics. Lane group g of a warp only meets
// destinations with d % G == g, so the 32 lanes touch 32 different banks. Tiles arrive by asynchronous copies that start
// at the 16-byte boundary before the row's first element, so no row needs to be aligned: by the bulk copy engine where
// there is one (compute capability 9), asked by a warp of its own, else 16 bytes a thread.
//
// Compile-time constants: IN, OUT (see common.cuh), R, T (columns a tile), WARPS, STAGES, GATHER.
#define G (32 / R)
#define GROUPS (WARPS * G)
#define THREADS (WARPS * 32)
#define WIDTH ((int)sizeof(in_t))
#if GATHER
// Gathered tiles are widened on their way through registers.
typedef float tile_t;
#else
typedef in_t tile_t;
#endif
#define PITCH_BYTES (T * (int)sizeof(tile_t) + 4 * (R >= 8 ? 4 : 32 / R))
#define X_BYTES (R * PITCH_BYTES)
#define CHUNKS (T * WIDTH / 16 + 1)
#define BULK (!GATHER && __CUDA_ARCH__ >= 900)

// Joins the warps that add; the copying warp, where there is one, runs ahead on its own.
__device__ __forceinline__ void join() {
#if BULK
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
#else
    __syncthreads();
#endif
}

__device__ __forceinline__ void await(u64* barrier, u32 phase) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@done bra over;\n"
        "bra again;\nover:\n}" ::"r"(shared_address(barrier)),
        "r"(phase)
        : "memory");
}

__device__ __forceinline__ float tile_value(const tile_t* row, u32 entry) {
#if GATHER
    float v = row[entry & 0x7fff];
#else
    float v = widen(row[entry & 0x7fff]);
#endif
    return __uint_as_float(__float_as_uint(v) ^ ((entry << 16) & 0x80000000u));
}

extern "C" __global__ void __launch_bounds__(THREADS + (BULK ? 32 : 0)) sjlt(
    const in_t* __restrict__ x, i64 row_stride, int rows, i64 p,  // (rows, p), unit stride in a row
    const i64* __restrict__ columns,                              // GATHER: p kept columns of x
    const uint2* __restrict__ entries,                            // (steps, GROUPS) pairs: d << 16 | sign << 15 | column
    const int* __restrict__ offsets,                              // (passes, tiles + 1) first step of a tile
    int entry_bytes,                                              // room for the longest tile's entries
    void* __restrict__ out, int direct, float scale,              // direct: the final (rows, k), else (splits, rows, k)
    int k, int k_pass, int copies,                                // copies: partial sums a destination, added at the end
    int tiles, int tiles_a_split, int row_groups) {
    extern __shared__ __align__(16) unsigned char memory[];
    const int kv = (k_pass * copies + G - 1) / G * G + G;  // the last G rows swallow the padding entries
    float* sums = (float*)memory;
    unsigned char* stages = memory + kv * R * 4;
    const int stage_bytes = X_BYTES + entry_bytes;
    __shared__ int steps_of[STAGES];

    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int row_group = blockIdx.x % row_groups, split = blockIdx.x / row_groups, pass = blockIdx.y;
    const int first_row = row_group * R;
    const int r = lane % R, group = warp * G + lane / R;
    const int* offset = offsets + (i64)pass * (tiles + 1);
    const int t_begin = split * tiles_a_split, t_end = min(tiles, t_begin + tiles_a_split);

    for (int i = tid; i < kv * R / 4; i += THREADS) ((float4*)sums)[i] = make_float4(0.f, 0.f, 0.f, 0.f);

    int next_begin = t_begin < t_end ? offset[t_begin] : 0;
    int next_end = t_begin < t_end ? offset[t_begin + 1] : 0;

#if GATHER
    const int PER = (T * R + THREADS - 1) / THREADS;
    float held[PER];
    auto fetch = [&](int t) {
#pragma unroll
        for (int i = 0; i < PER; i++) {
            int at = tid + i * THREADS, row = at / T;
            i64 j = (i64)t * T + at % T;
            held[i] = 0.f;
            if (at < T * R && j < p && first_row + row < rows)
                held[i] = widen(x[(i64)(first_row + row) * row_stride + columns[j]]);
        }
    };
#endif

#if BULK
    // Lane r < R of the copying warp asks for row r of a tile, lane R for its entries. `arrived` counts a stage's bytes,
    // `drained` says that all are done with it.
    __shared__ u64 arrived[STAGES], drained[STAGES];
    if (tid == 0) {
        for (int s = 0; s < STAGES; s++) {
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(arrived + s)));
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(drained + s)));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warp == WARPS) {
        const unsigned char* row_begin = (const unsigned char*)(x + (i64)min(first_row + lane, rows - 1) * row_stride);
        const bool live = lane < R && first_row + lane < rows;
        for (int t = t_begin; t < t_end; t++) {
            const int turn = (t - t_begin) / STAGES, stage = (t - t_begin) % STAGES;
            const u32 to = shared_address(stages + stage * stage_bytes);
            const int steps = next_end - next_begin;
            const unsigned char* from = (const unsigned char*)(entries + (i64)next_begin * GROUPS);
            int bytes = lane == R ? steps * GROUPS * 8 : 0;
            if (live) {
                // The end is rounded up to 16 bytes: those bytes share a memory page with the row's last element.
                const unsigned char* start = row_begin + (i64)t * T * WIDTH;
                from = (const unsigned char*)((u64)start & ~(u64)15);
                i64 end = min((i64)(start - from) + T * WIDTH, (i64)(row_begin + p * WIDTH - from));
                bytes = ((int)end + 15) & ~15;
            }
            const int total = __reduce_add_sync(0xffffffffu, bytes);
            if (turn > 0) await(drained + stage, (turn - 1) & 1);
            const u32 barrier = shared_address(arrived + stage);
            if (lane == 0) {
                steps_of[stage] = steps;
                asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(total) : "memory");
            }
            __syncwarp();
            if (bytes > 0)
                asm volatile(
                    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                        to + (lane == R ? X_BYTES : lane * PITCH_BYTES)),
                    "l"(from), "r"(bytes), "r"(barrier)
                    : "memory");
            next_begin = next_end;
            if (t + 1 < t_end) next_end = offset[t + 2];
        }
        return;
    }
#else
    auto issue = [&](int t) {
        if (t < t_end) {
            int stage = (t - t_begin) % STAGES;
            unsigned char* to = stages + stage * stage_bytes;
#if GATHER
#pragma unroll
            for (int i = 0; i < PER; i++) {
                int at = tid + i * THREADS;
                if (at < T * R) ((float*)(to + (at / T) * PITCH_BYTES))[at % T] = held[i];
            }
            if (t + 1 < t_end) fetch(t + 1);
#else
#pragma unroll 2
            for (int i = tid; i < R * CHUNKS; i += THREADS) {
                int row = i / CHUNKS, chunk = i % CHUNKS;
                bool live = first_row + row < rows;
                const unsigned char* begin =
                    (const unsigned char*)(x + (i64)(live ? first_row + row : first_row) * row_stride);
                const unsigned char* end = begin + p * WIDTH;
                const unsigned char* from =
                    (const unsigned char*)((u64)(begin + (i64)t * T * WIDTH) & ~(u64)15) + 16 * chunk;
                i64 left = end - from;
                int bytes = live ? (int)max((i64)0, min((i64)16, left)) : 0;
                // Nothing is read where bytes is 0, but the address must still be aligned and ours.
                copy16(shared_address(to + row * PITCH_BYTES + 16 * chunk),
                       bytes > 0 ? from : (const unsigned char*)((u64)begin & ~(u64)15), bytes);
            }
#endif
            int steps = next_end - next_begin;
            const unsigned char* from = (const unsigned char*)(entries + (i64)next_begin * GROUPS);
            u32 table = shared_address(to + X_BYTES);
            for (int i = tid; i < steps * GROUPS / 2; i += THREADS) copy16(table + 16 * i, from + 16 * (i64)i, 16);
            if (tid == 0) steps_of[stage] = steps;
            next_begin = next_end;
            if (t + 1 < t_end) next_end = offset[t + 2];
        }
        copies_commit();
    };

#if GATHER
    if (t_begin < t_end) fetch(t_begin);
#endif
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) issue(t_begin + s);
#endif

    const i64 my_row = min(first_row + r, rows - 1);
#if GATHER
    const int shift = 0;
#else
    const int shift = (int)((u64)(x + my_row * row_stride) & 15) / WIDTH;
#endif
    float* sum = sums + r;
    for (int t = t_begin; t < t_end; t++) {
        const int stage = (t - t_begin) % STAGES;
#if BULK
        await(arrived + stage, (t - t_begin) / STAGES & 1);
#else
        copies_wait<STAGES - 2>();
        join();  // the tile is there for all, and all are done with the stage that is filled next
        issue(t + STAGES - 1);
#endif
        const unsigned char* at = stages + stage * stage_bytes;
        const tile_t* row = (const tile_t*)(at + r * PITCH_BYTES) + shift;
        const uint2* step = (const uint2*)(at + X_BYTES) + group;
        const uint2* last = step + (steps_of[stage] - 1) * GROUPS;
        uint2 e = make_uint2(0, 0);
        float a = 0.f, b = 0.f;
        if (step <= last) {
            e = *step;
            a = tile_value(row, e.x);
            b = tile_value(row, e.y);
        }
#if BULK
        join();  // a destination may change hands between tiles
        if (tid == 0 && t > t_begin) {
            u32 previous = shared_address(drained + (t - 1 - t_begin) % STAGES);
            asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(previous) : "memory");
        }
#endif
        if (step <= last) {
            while (step < last) {
                step += GROUPS;
                uint2 f = *step;  // the next pair is read before this one is added
                float c = tile_value(row, f.x), d = tile_value(row, f.y);
                sum[(e.x >> 16) * R] += a;
                sum[(e.y >> 16) * R] += b;
                e = f;
                a = c;
                b = d;
            }
            sum[(e.x >> 16) * R] += a;
            sum[(e.y >> 16) * R] += b;
        }
    }
#if !BULK
    copies_wait<0>();
#endif
    join();

    const int k_begin = pass * k_pass, k_here = min(k_pass, k - k_begin);
    for (int d = tid; d < k_here; d += THREADS) {
        float total[R];
#pragma unroll
        for (int i = 0; i < R; i++) total[i] = 0.f;
        for (int copy = 0; copy < copies; copy++)
#pragma unroll
            for (int i = 0; i < R; i++) total[i] += sums[(d * copies + copy) * R + i];
#pragma unroll
        for (int i = 0; i < R; i++) {
            if (first_row + i < rows) {
                i64 to = ((i64)split * rows + first_row + i) * k + k_begin + d;
                if (direct) ((out_t*)out)[to] = narrow(total[i] * scale);
                else ((float*)out)[to] = total[i];
            }
        }
    }
}

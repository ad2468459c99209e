// Many layers at once: G = sum over tokens of left^T right, and the SJLT of the flattened G, which never leaves the chip.
//
// A thread block takes one sample of one layer. Tiles of 32 tokens arrive by asynchronous copies; tensor cores multiply
// bfloat16 and add in float32 (the products are exact); G then lies in shared memory, and every output adds its own
// entries in ascending order. Without a second stage G itself is the result.
//
// Compile-time constants: K1, K2 (multiples of 16, sides of G), SJLT, NEAR (bytes into shared memory from where the
// SJLT's table lies beside G, 0 if it stays where it is), ENTRIES (their number), LAYERS (room in the arguments).
#define WARPS 8
#define THREADS (WARPS * 32)
#define STAGES 3
#define TOKENS 32
#define MT (K1 / 16)
#define NT (K2 / 16)
#define WM (MT % 4 == 0 ? 4 : MT % 2 == 0 ? 2 : 1)
#define WN (WARPS / WM)
#define MINE (MT / WM)
#define PAIRS ((NT + WN - 1) / WN)
#define LEFT_PITCH (K1 * 2 + 16)
#define RIGHT_PITCH (K2 * 2 + 16)
#define STAGE_BYTES (TOKENS * (LEFT_PITCH + RIGHT_PITCH))

struct Layer {
    const u16* left;       // (samples, tokens, K1), rows left_pitch elements apart
    const u16* right;      // (samples, tokens, K2), rows right_pitch elements apart
    const u16* entries;    // SJLT: sign << 15 | place in G, by destination
    const int* offsets;    // SJLT: (k + 1) first entry of each destination
    float* out;            // (samples, k)
    float scale;
    int left_pitch, right_pitch;  // multiples of 8
};
struct Layers {
    Layer layer[LAYERS];
};

__device__ __forceinline__ void load4(u32* to, u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

__device__ __forceinline__ void multiply(float* c, const u32* a, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Where an element of G lies: rows that a warp writes together begin in different banks.
__device__ __forceinline__ int place(int i) { return K2 % 32 == 0 ? i ^ (((i / K2) & 3) << 3) : i; }

extern "C" __global__ void __launch_bounds__(THREADS) contract(const __grid_constant__ Layers layers, int tokens, int k) {
    extern __shared__ __align__(16) unsigned char memory[];
    const Layer& layer = layers.layer[blockIdx.y];
    const i64 sample = blockIdx.x;
    const i64 left_pitch = layer.left_pitch, right_pitch = layer.right_pitch;
    const u16* left = layer.left + sample * tokens * left_pitch;
    const u16* right = layer.right + sample * tokens * right_pitch;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int warp_m = warp % WM, warp_n = warp / WM;

    auto issue = [&](int tile) {
        const int begin = tile * TOKENS;
        if (begin < tokens) {
            unsigned char* to = memory + (tile % STAGES) * STAGE_BYTES;
            for (int i = tid; i < TOKENS * (K1 + K2) / 8; i += THREADS) {
                const bool is_left = i < TOKENS * K1 / 8;
                const int at = is_left ? i : i - TOKENS * K1 / 8;
                const int row = is_left ? at / (K1 / 8) : at / (K2 / 8);
                const int chunk = is_left ? at % (K1 / 8) : at % (K2 / 8);
                const bool live = begin + row < tokens;
                const i64 token = live ? begin + row : begin;
                const u16* from = is_left ? left + token * left_pitch + chunk * 8 : right + token * right_pitch + chunk * 8;
                unsigned char* place = is_left ? to + row * LEFT_PITCH + chunk * 16
                                               : to + TOKENS * LEFT_PITCH + row * RIGHT_PITCH + chunk * 16;
                copy16(shared_address(place), from, live ? 16 : 0);
            }
        }
        copies_commit();
    };

#if NEAR
    // The table arrives while the products run: read from afar, every output would wait for it twice.
    u16* near_entries = (u16*)(memory + NEAR);
    int* near_offsets = (int*)(memory + NEAR + 2 * ENTRIES);
    auto issue_table = [&]() {
        for (int i = tid; i < ENTRIES / 8; i += THREADS)
            copy16(shared_address(near_entries + i * 8), layer.entries + i * 8, 16);
        const int bytes = (k + 1) * 4;
        for (int i = tid; i * 16 < bytes; i += THREADS)
            copy16(shared_address(near_offsets + i * 4), layer.offsets + i * 4, min(16, bytes - i * 16));
    };
#endif

    float sum[MINE][PAIRS][2][4];
#pragma unroll
    for (int m = 0; m < MINE; m++)
#pragma unroll
        for (int n = 0; n < PAIRS; n++)
#pragma unroll
            for (int i = 0; i < 8; i++) sum[m][n][i / 4][i % 4] = 0.f;

    const int tiles = (tokens + TOKENS - 1) / TOKENS;
#pragma unroll
    for (int t = 0; t < STAGES - 1; t++) issue(t);
    // Lane l gives the address of row l % 8 of the 8 x 8 block l / 8.
    const int block = lane / 8, line = lane % 8;
    const int a_place = ((block / 2) * 8 + line) * LEFT_PITCH + (block % 2) * 16;
    const int b_place = ((block % 2) * 8 + line) * RIGHT_PITCH + (block / 2) * 16;
    for (int t = 0; t < tiles; t++) {
        copies_wait<STAGES - 2>();
        __syncthreads();
#if NEAR
        if (t == 0) issue_table();
#endif
        issue(t + STAGES - 1);
        const u32 stage = shared_address(memory + (t % STAGES) * STAGE_BYTES);
#pragma unroll
        for (int step = 0; step < TOKENS / 16; step++) {
            u32 a[MINE][4];
#pragma unroll
            for (int m = 0; m < MINE; m++)
                load4(a[m], stage + step * 16 * LEFT_PITCH + a_place + (m * WM + warp_m) * 32);
#pragma unroll
            for (int n = 0; n < PAIRS; n++) {
                const int pair = n * WN + warp_n;
                if (pair < NT) {
                    u32 b[4];
                    load4(b, stage + TOKENS * LEFT_PITCH + step * 16 * RIGHT_PITCH + b_place + pair * 32);
#pragma unroll
                    for (int m = 0; m < MINE; m++) {
                        multiply(sum[m][n][0], a[m], b[0], b[1]);
                        multiply(sum[m][n][1], a[m], b[2], b[3]);
                    }
                }
            }
        }
    }
    copies_wait<0>();
    __syncthreads();

    float* whole = (float*)memory;
#pragma unroll
    for (int m = 0; m < MINE; m++)
#pragma unroll
        for (int n = 0; n < PAIRS; n++) {
            const int pair = n * WN + warp_n;
            if (pair < NT)
#pragma unroll
                for (int i = 0; i < 8; i += 2) {
                    const int half = i / 4, c = i % 4;
                    const int row = (m * WM + warp_m) * 16 + lane / 4 + (c / 2) * 8;
                    const int column = pair * 16 + half * 8 + (lane % 4) * 2;
                    *(float2*)(whole + place(row * K2 + column)) = make_float2(sum[m][n][half][c], sum[m][n][half][c + 1]);
                }
        }
    __syncthreads();

    float* out = layer.out + sample * k;
#if NEAR
    const u16* entries = near_entries;
    const int* offsets = near_offsets;
#else
    const u16* entries = layer.entries;
    const int* offsets = layer.offsets;
#endif
#if SJLT
    for (int d = tid; d < k; d += THREADS) {
        float total = 0.f;
        const int end = offsets[d + 1];
        for (int i = offsets[d]; i < end; i++) {
            const u32 entry = entries[i];
            total += __uint_as_float(__float_as_uint(whole[place(entry & 0x7fff)]) ^ ((entry << 16) & 0x80000000u));
        }
        out[d] = total * layer.scale;
    }
#else
    for (int d = tid; d < K1 * K2; d += THREADS) out[d] = whole[place(d)] * layer.scale;
#endif
}

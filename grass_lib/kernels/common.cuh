// Conversions and asynchronous copies shared by the kernels. No header is included: NVRTC needs no include folder then.
typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;
typedef unsigned long long u64;

// IN and OUT: 0 = float, 1 = half, 2 = bfloat16.
#if IN == 0
typedef float in_t;
__device__ __forceinline__ float widen(in_t v) { return v; }
#else
typedef u16 in_t;
__device__ __forceinline__ float widen(in_t v) {
#if IN == 1
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
#else
    return __uint_as_float((u32)v << 16);
#endif
}
#endif

#if OUT == 0
typedef float out_t;
__device__ __forceinline__ out_t narrow(float v) { return v; }
#else
typedef u16 out_t;
__device__ __forceinline__ out_t narrow(float v) {
    u16 h;
#if OUT == 1
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
#else
    // Round to nearest even by hand, so that devices without the instruction agree; NaN stays NaN.
    u32 u = __float_as_uint(v);
    h = (u & 0x7fffffffu) > 0x7f800000u ? (u16)((u >> 16) | 0x40u) : (u16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
#endif
    return h;
}
#endif

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return (u32)__cvta_generic_to_shared(pointer);
}

// Copies `bytes` (0 to 16) from global memory and fills the rest of the 16 with zeros.
__device__ __forceinline__ void copy16(u32 to, const void* from, int bytes) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
#else
    u32 word[4] = {0, 0, 0, 0};
    for (int i = 0; i < bytes; i += 2) {
        u32 half_word = ((const u16*)from)[i >> 1];
        word[i >> 2] |= half_word << ((i & 2) * 8);
    }
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
#endif
}
__device__ __forceinline__ void copies_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int PENDING>
__device__ __forceinline__ void copies_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// What every kernel is written in. Two compilers read this: NVRTC, which needs no header of a toolkit, and the system's
// C++ compiler for the host shim of the tests, where pointers check their bounds and shared memory its races.
//
// Rules for kernels, so that both read them alike:
//  * buffers are IN(T) and OUT(T), never bare pointers; device functions take them as template parameters;
//  * an element is read into a variable of its own type (no `auto`);
//  * barriers and lane exchanges are reached by all threads of a block or lanes of a warp;
//  * no atomics: every sum has one fixed order.
#ifdef DRAFTSMITH_SHIM
#include "shim.h"
#else
#define DEVICE static __device__ __forceinline__
#define KERNEL(name, ...) extern "C" __global__ void __launch_bounds__(256) name(__VA_ARGS__)
#define IN(T) const T *__restrict__
#define OUT(T) T *__restrict__
// A structure that is read where it was handed over, by indices of the run.
#define VALUE(T) const __grid_constant__ T
#define HAS(pointer) ((pointer) != 0)
#define SHARED(T, name, count) __shared__ T name[count]
#define SYNC() __syncthreads()
#define LANE_XOR(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
#define LANE_FROM(value, lane) __shfl_sync(0xffffffffu, value, lane)
#define THREAD ((int)threadIdx.x)
#define THREADS ((int)blockDim.x)
#define BLOCK_X ((i64)blockIdx.x)
#define BLOCK_Y ((i64)blockIdx.y)
#define BLOCKS_X ((i64)gridDim.x)
#define UNROLL _Pragma("unroll")
#define UNROLL_SOME _Pragma("unroll 4")
#define UNROLL_NONE _Pragma("unroll 1")
#define MINUS_INFINITY __int_as_float(0xff800000)
// A product that is rounded by itself, whatever is added to it.
#define MUL(a, b) __fmul_rn(a, b)
#define F16_TO_F32(to, from) asm("cvt.f32.f16 %0, %1;" : "=f"(to) : "h"(from))
#define F32_TO_F16(to, from) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to) : "f"(from))
// A word of two bf16.
#define PAIR_BF16(word, low, high) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low))
// sums[16, 8] += left[16, 16] right[16, 8] by a whole warp; operands are pairs of bf16.
#define MMA(sums, left, right_low, right_high)                                                                         \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "                                                \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                     \
                 : "+f"((sums)[0]), "+f"((sums)[1]), "+f"((sums)[2]), "+f"((sums)[3])                                  \
                 : "r"((left)[0]), "r"((left)[1]), "r"((left)[2]), "r"((left)[3]), "r"(right_low), "r"(right_high))
#endif

typedef long long i64;
typedef unsigned int u32;
typedef unsigned short bf16;
typedef unsigned short u16;
typedef unsigned long long u64;

#define NO_ID 0xffffffffu

// Rounded to the nearest bfloat16, ties to even; NaN stays NaN.
DEVICE bf16 to_bf16(float value) {
    union { float f; u32 u; } bits;
    bits.f = value;
    if (value != value) return (bf16)((bits.u >> 16) | 0x40u);
    return (bf16)((bits.u + 0x7fffu + ((bits.u >> 16) & 1u)) >> 16);
}

DEVICE float from_bf16(bf16 value) {
    union { float f; u32 u; } bits;
    bits.u = (u32)value << 16;
    return bits.f;
}

DEVICE float from_f16(u16 bits) {
    float value;
    F16_TO_F32(value, bits);
    return value;
}

// The nearest f16, ties to even; what is larger than the largest becomes that.
DEVICE u16 to_f16(float value) {
    u16 bits;
    float most = 65504.0f;
    // Comparisons that leave NaN as it is.
    float clamped = value > most ? most : value < -most ? -most : value;
    F32_TO_F16(bits, clamped);
    return bits;
}

DEVICE float warp_sum(float value) {
    UNROLL
    for (int mask = 16; mask > 0; mask >>= 1) value += LANE_XOR(value, mask);
    return value;
}

DEVICE float warp_max(float value) {
    UNROLL
    for (int mask = 16; mask > 0; mask >>= 1) value = fmaxf(value, LANE_XOR(value, mask));
    return value;
}

// The sum over all threads of a block, for all of them; `room` holds a value per warp.
template <class Room> DEVICE float block_sum(float value, Room room) {
    value = warp_sum(value);
    if (THREAD % 32 == 0) room[THREAD / 32] = value;
    SYNC();
    float sum = 0.0f;
    for (int warp = 0; warp < THREADS / 32; warp++) sum += room[warp];
    SYNC();
    return sum;
}

template <class Room> DEVICE float block_max(float value, Room room) {
    value = warp_max(value);
    if (THREAD % 32 == 0) room[THREAD / 32] = value;
    SYNC();
    float most = MINUS_INFINITY;
    for (int warp = 0; warp < THREADS / 32; warp++) most = fmaxf(most, room[warp]);
    SYNC();
    return most;
}

// The lowest of the ids that the threads of a block name; NO_ID is none.
template <class Room> DEVICE u32 block_lowest(u32 id, Room room) {
    UNROLL
    for (int mask = 16; mask > 0; mask >>= 1) {
        u32 other = LANE_XOR(id, mask);
        id = other < id ? other : id;
    }
    if (THREAD % 32 == 0) room[THREAD / 32] = id;
    SYNC();
    u32 lowest = NO_ID;
    for (int warp = 0; warp < THREADS / 32; warp++) {
        u32 other = room[warp];
        lowest = other < lowest ? other : lowest;
    }
    SYNC();
    return lowest;
}

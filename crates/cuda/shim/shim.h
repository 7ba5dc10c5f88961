// Runs the kernels on the host, for the tests: every thread of a block is a fiber, barriers and lane exchanges switch
// between them, blocks run one after the other. It finds what a card would not tell:
//  * reads and writes outside a buffer, through a null buffer, and vectors that are not aligned;
//  * races: two threads touch one element, one of them writes, and no barrier of their block stands between; across
//    blocks nothing stands between but the end of the launch;
//  * reads of shared memory that nobody wrote;
//  * barriers and lane exchanges that some threads miss, or reach at different lines;
//  * arguments whose number or size is not what the kernel takes.
#pragma once
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace shim {

// A stack that can be left and gone on with.
#if defined(__x86_64__)
struct Context {
    void *stack_pointer = nullptr;
};
// Keeps what a call must keep, leaves the stack, goes on with the other. (`swapcontext` asks the kernel for the signal
// mask each time, which takes most of the time of a test.)
extern "C" void shim_switch(void **leave, void *enter);
inline void go(Context &leave, Context &enter) { shim_switch(&leave.stack_pointer, enter.stack_pointer); }
#else
struct Context {
    ucontext_t context;
};
inline void go(Context &leave, Context &enter) { swapcontext(&leave.context, &enter.context); }
#endif


// Who touched an element last.
struct Touch {
    uint32_t launch = 0, block = 0, phase = 0, thread = 0;
};
constexpr uint32_t MANY = 0xffffffffu;

struct Trace {
    Touch write, read;
    uint32_t written_in = 0; // launch and block of shared memory; unused for buffers
};

// A buffer of the device: the host allocates it by `shim_alloc`.
struct Buffer {
    unsigned char *data;
    uint64_t bytes;
    Trace *traces; // one for every two bytes
    uint32_t shared; // memory of a block
};

enum State { READY, AT_BARRIER, AT_EXCHANGE, DONE };

struct Fiber {
    Context context;
    std::unique_ptr<unsigned char[]> stack;
    State state;
    int line;
};

constexpr size_t STACK = 128 << 10;

struct Machine {
    uint32_t launch = 0, block = 0, phase = 0, thread = 0, threads = 0;
    uint32_t block_x = 0, block_y = 0, grid_x = 0;
    Context main, dropped;
    std::vector<Fiber> fibers;
    std::vector<unsigned char> exchange; // [parity][thread][16 bytes]
    std::vector<unsigned char> parity;   // [thread]
    std::map<int, std::unique_ptr<Buffer>> shared;
    std::vector<std::unique_ptr<unsigned char[]>> shared_data;
    std::vector<std::unique_ptr<Trace[]>> shared_traces;
    std::string error;
    const char *kernel = "";
    void (*body)(void *) = nullptr;
    void *arguments = nullptr;
};
extern Machine machine;

[[noreturn]] inline void fail(const char *format, ...) {
    char text[512];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    char full[768];
    snprintf(full, sizeof full, "%s, block %u, thread %u: %s", machine.kernel, machine.block, machine.thread, text);
    machine.error = full;
    // The fiber is left where it is: kernels own nothing that would have to be freed.
    go(machine.dropped, machine.main);
    abort();
}

inline void check_place(const Buffer *b, int64_t at, int64_t begin, int64_t end, size_t size) {
    if (b == nullptr) fail("a null buffer is used");
    if (at < begin || at + (int64_t)size > end)
        fail("element at byte %lld of %s of %lld bytes", (long long)(at - begin),
             b->shared ? "shared memory" : "a buffer", (long long)(end - begin));
    if (at % size != 0) fail("byte %lld is no place for an element of %zu bytes", (long long)at, size);
}

inline bool same_phase(const Touch &t) { return t.block == machine.block && t.phase == machine.phase; }

inline void note_read(Buffer *b, int64_t at) {
    Trace &t = b->traces[at / 2];
    Touch &w = t.write, &r = t.read;
    if (b->shared && (w.launch != machine.launch || w.block != machine.block))
        fail("shared memory at byte %lld is read before it is written", (long long)at);
    if (w.launch == machine.launch) {
        if (w.block != machine.block) fail("race: byte %lld was written by block %u", (long long)at, w.block);
        if (same_phase(w) && w.thread != machine.thread)
            fail("race: byte %lld was written by thread %u without a barrier between", (long long)at, w.thread);
    }
    if (r.launch != machine.launch) {
        r = Touch{machine.launch, machine.block, machine.phase, machine.thread};
    } else if (r.block != machine.block) {
        r.block = MANY;
    } else if (r.phase != machine.phase) {
        r.phase = machine.phase;
        r.thread = machine.thread;
    } else if (r.thread != machine.thread) {
        r.thread = MANY;
    }
}

inline void note_write(Buffer *b, int64_t at) {
    Trace &t = b->traces[at / 2];
    Touch &w = t.write, &r = t.read;
    for (const Touch *other : {&w, &r}) {
        if (other->launch != machine.launch) continue;
        const char *what = other == &w ? "written" : "read";
        if (other->block != machine.block) fail("race: byte %lld was %s by another block", (long long)at, what);
        if (same_phase(*other) && other->thread != machine.thread)
            fail("race: byte %lld was %s by another thread without a barrier between", (long long)at, what);
    }
    w = Touch{machine.launch, machine.block, machine.phase, machine.thread};
}

template <class T> struct Ref {
    Buffer *buffer;
    int64_t at;
    operator T() const {
        note_read(buffer, at);
        T value;
        memcpy(&value, buffer->data + at, sizeof(T));
        return value;
    }
    Ref &operator=(T value) {
        note_write(buffer, at);
        memcpy(buffer->data + at, &value, sizeof(T));
        return *this;
    }
    Ref &operator=(const Ref &other) { return *this = (T)other; }
    Ref(const Ref &) = default;
    Ref(Buffer *buffer, int64_t at) : buffer(buffer), at(at) {}
    Ref &operator+=(T value) { return *this = (T)*this + value; }
    Ref &operator*=(T value) { return *this = (T)*this * value; }
    Ref &operator-=(T value) { return *this = (T)*this - value; }
};

// A pointer into a buffer. As the host passes it: the buffer, a place in bytes, and from where to where it may touch it.
template <class T> struct Pointer {
    using Value = std::remove_const_t<T>;
    Buffer *buffer;
    int64_t at, begin, end;
    auto operator[](int64_t index) const {
        int64_t place = at + index * (int64_t)sizeof(T);
        check_place(buffer, place, begin, end, sizeof(T));
        if constexpr (std::is_const_v<T>) {
            return (Value)Ref<Value>(buffer, place);
        } else {
            return Ref<Value>(buffer, place);
        }
    }
    Pointer operator+(int64_t index) const { return Pointer{buffer, at + index * (int64_t)sizeof(T), begin, end}; }
};

inline void switch_out(State state, int line) {
    Fiber &f = machine.fibers[machine.thread];
    f.state = state;
    f.line = line;
    go(f.context, machine.main);
}

inline void barrier(int line) { switch_out(AT_BARRIER, line); }

// Every lane leaves a value and takes that of another.
template <class T> T exchange(T value, int lane_mask, int line) {
    static_assert(sizeof(T) <= 16, "a lane exchanges at most 16 bytes");
    if (lane_mask < 1 || lane_mask > 31) fail("lane mask %d", lane_mask);
    uint32_t me = machine.thread;
    // Two rooms in turn: a lane is at most one exchange ahead of the others of its warp.
    unsigned char parity = machine.parity[me] ^= 1;
    size_t room = parity * (size_t)machine.threads;
    memcpy(&machine.exchange[(room + me) * 16], &value, sizeof(T));
    switch_out(AT_EXCHANGE, line);
    memcpy(&value, &machine.exchange[(room + (me ^ (uint32_t)lane_mask)) * 16], sizeof(T));
    return value;
}

// Lanes of a warp that all leave a value and see those of all.
template <class T> void share_in_warp(const T &value, T (&all)[32], int line) {
    static_assert(sizeof(T) <= 16, "a lane exchanges at most 16 bytes");
    uint32_t me = machine.thread;
    unsigned char parity = machine.parity[me] ^= 1;
    size_t room = parity * (size_t)machine.threads;
    memcpy(&machine.exchange[(room + me) * 16], &value, sizeof(T));
    switch_out(AT_EXCHANGE, line);
    for (uint32_t lane = 0; lane < 32; lane++)
        memcpy(&all[lane], &machine.exchange[(room + me / 32 * 32 + lane) * 16], sizeof(T));
}

// The value of one lane, for all of its warp.
template <class T> T from_lane(T value, int lane, int line) {
    static_assert(sizeof(T) <= 16, "a lane exchanges at most 16 bytes");
    if (lane < 0 || lane > 31) fail("lane %d", lane);
    uint32_t me = machine.thread;
    unsigned char parity = machine.parity[me] ^= 1;
    size_t room = parity * (size_t)machine.threads;
    memcpy(&machine.exchange[(room + me) * 16], &value, sizeof(T));
    switch_out(AT_EXCHANGE, line);
    memcpy(&value, &machine.exchange[(room + me / 32 * 32 + lane) * 16], sizeof(T));
    return value;
}

// The product of the tensor cores, mma.m16n8k16 of PTX: each lane brings its words of both operands and takes its four
// numbers of the result.
inline void mma(float *sums, const uint32_t *left, uint32_t right_low, uint32_t right_high, int line) {
    struct Left { uint32_t words[4]; };
    struct Right { uint32_t words[2]; };
    Left lefts[32];
    Right rights[32];
    share_in_warp(Left{{left[0], left[1], left[2], left[3]}}, lefts, line);
    share_in_warp(Right{{right_low, right_high}}, rights, line);
    auto half = [](uint32_t word, int which) {
        uint32_t bits = which ? word & 0xffff0000u : word << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    };
    int lane = (int)(machine.thread % 32);
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = sums[i];
        for (int k = 0; k < 16; k++) {
            // Element (row, k) of the left: lane and word by the table of PTX; element (k, column) of the right alike.
            float a = half(lefts[row % 8 * 4 + k % 8 / 2].words[row / 8 + k / 8 * 2], k % 2);
            float b = half(rights[column * 4 + k % 8 / 2].words[k / 8], k % 2);
            sum += a * b;
        }
        sums[i] = sum;
    }
}

// IEEE's 16-bit floats.
inline float from_half(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ffu;
    if (exponent == 0) {
        float value = (float)mantissa * 5.9604644775390625e-8f; // 2^-24
        return sign ? -value : value;
    }
    uint32_t all = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    float value;
    memcpy(&value, &all, 4);
    return value;
}
inline uint16_t to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    uint32_t size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return sign | 0x7e00u;
    if (size >= 0x477ff000u) return sign | 0x7c00u;
    if (size < 0x38800000u) {
        // Below the smallest normal number: units of 2^-24, rounded by the addition.
        float magnitude;
        memcpy(&magnitude, &size, 4);
        float sum = magnitude + 0.5f;
        memcpy(&bits, &sum, 4);
        return sign | (uint16_t)(bits - 0x3f000000u);
    }
    size += 0xfffu + (size >> 13 & 1u);
    return sign | (uint16_t)((size >> 13) - (112u << 10));
}

template <class T> Pointer<T> shared(int line, size_t count) {
    std::unique_ptr<Buffer> &b = machine.shared[line];
    if (!b) {
        size_t bytes = count * sizeof(T);
        machine.shared_data.emplace_back(new unsigned char[bytes]);
        machine.shared_traces.emplace_back(new Trace[bytes / 2 + 1]());
        b.reset(new Buffer{machine.shared_data.back().get(), bytes, machine.shared_traces.back().get(), 1});
        size_t total = 0;
        for (const auto &[_, other] : machine.shared) total += other->bytes;
        if (total > 48 << 10) fail("%zu bytes of shared memory", total);
    }
    return Pointer<T>{b.get(), 0, 0, (int64_t)b->bytes};
}

struct Registered {
    void (*run)(void **);
    std::vector<uint64_t> sizes;
};
std::map<std::string, Registered> &registry();

template <class... A> struct Call {
    template <void (*F)(A...)> static void run(void **arguments) { with<F>(arguments, std::index_sequence_for<A...>{}); }
    template <void (*F)(A...), size_t... I> static void with(void **arguments, std::index_sequence<I...>) {
        F(*(A *)arguments[I]...);
    }
};
template <class... A> std::vector<uint64_t> sizes_of(void (*)(A...)) { return {sizeof(A)...}; }
template <class... A> Call<A...> call_of(void (*)(A...));

struct Register {
    Register(const char *name, void (*run)(void **), std::vector<uint64_t> sizes) { registry()[name] = {run, sizes}; }
};

} // namespace shim

#define DEVICE static inline
#define KERNEL(name, ...)                                                                                              \
    static void name(__VA_ARGS__);                                                                                     \
    static shim::Register register_##name(#name, &decltype(shim::call_of(&name))::template run<&name>,                 \
                                          shim::sizes_of(&name));                                                      \
    static void name(__VA_ARGS__)
#define IN(T) shim::Pointer<const T>
#define OUT(T) shim::Pointer<T>
#define VALUE(T) T
#define HAS(pointer) ((pointer).buffer != nullptr)
// Within one launch a line stands for one array: the instance of a template is the same for all threads.
#define SHARED(T, name, count) shim::Pointer<T> name = shim::shared<T>(__LINE__, count)
#define SYNC() shim::barrier(__LINE__)
#define LANE_XOR(value, mask) shim::exchange(value, mask, __LINE__)
#define LANE_FROM(value, lane) shim::from_lane(value, lane, __LINE__)
#define MUL(a, b) ((a) * (b))
#define F16_TO_F32(to, from) to = shim::from_half(from)
#define F32_TO_F16(to, from) to = shim::to_half(from)
#define MMA(sums, left, right_low, right_high) shim::mma(sums, left, right_low, right_high, __LINE__)
#define PAIR_BF16(word, low, high) word = (u32)to_bf16(low) | (u32)to_bf16(high) << 16
#define THREAD ((int)shim::machine.thread)
#define THREADS ((int)shim::machine.threads)
#define BLOCK_X ((i64)shim::machine.block_x)
#define BLOCK_Y ((i64)shim::machine.block_y)
#define BLOCKS_X ((i64)shim::machine.grid_x)
#define UNROLL
#define UNROLL_SOME
#define UNROLL_NONE
#define MINUS_INFINITY (-INFINITY)

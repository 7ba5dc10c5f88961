// The side of the shim that the tests call, behind the kernels' source.

namespace shim {

Machine machine;

std::map<std::string, Registered> &registry() {
    static std::map<std::string, Registered> all;
    return all;
}

static void fiber_main() {
    machine.body(machine.arguments);
    switch_out(DONE, 0);
}

#if defined(__x86_64__)
asm(R"(
.text
.globl shim_switch
.hidden shim_switch
.type shim_switch, @function
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size shim_switch, .-shim_switch
)");

// A stack on which `fiber_main` begins as if it had been called.
static void prepare(Context &context, unsigned char *stack) {
    uintptr_t top = ((uintptr_t)stack + STACK) & ~(uintptr_t)15;
    void **at = (void **)top;
    *--at = nullptr;
    *--at = (void *)fiber_main;
    for (int i = 0; i < 6; i++) *--at = nullptr;
    context.stack_pointer = at;
}
#else
static void prepare(Context &context, unsigned char *stack) {
    getcontext(&context.context);
    context.context.uc_stack.ss_sp = stack;
    context.context.uc_stack.ss_size = STACK;
    context.context.uc_link = nullptr;
    makecontext(&context.context, fiber_main, 0);
}
#endif

struct Body {
    void (*run)(void **);
    void **arguments;
};

// Runs one block to its end, or leaves an error.
static void run_block() {
    const uint32_t threads = machine.threads;
    machine.phase = 0;
    machine.shared.clear();
    machine.shared_data.clear();
    machine.shared_traces.clear();
    for (uint32_t i = 0; i < threads; i++) {
        Fiber &f = machine.fibers[i];
        if (!f.stack) f.stack.reset(new unsigned char[STACK]);
        prepare(f.context, f.stack.get());
        f.state = READY;
        machine.parity[i] = 0;
    }
    while (true) {
        bool moved = false;
        for (uint32_t i = 0; i < threads; i++) {
            Fiber &f = machine.fibers[i];
            if (f.state != READY) continue;
            moved = true;
            machine.thread = i;
            go(machine.main, f.context);
            if (!machine.error.empty()) return;
        }
        // Warps whose lanes are all there go on.
        for (uint32_t warp = 0; warp < threads / 32; warp++) {
            uint32_t there = 0;
            for (uint32_t i = warp * 32; i < warp * 32 + 32; i++) there += machine.fibers[i].state == AT_EXCHANGE;
            if (there < 32) continue;
            for (uint32_t i = warp * 32; i < warp * 32 + 32; i++) {
                machine.thread = i;
                if (machine.fibers[i].line != machine.fibers[warp * 32].line) {
                    machine.error = "lanes of a warp exchange values at different lines";
                    return;
                }
                machine.fibers[i].state = READY;
                moved = true;
            }
        }
        if (moved) continue;
        uint32_t done = 0, waiting = 0;
        for (uint32_t i = 0; i < threads; i++) {
            done += machine.fibers[i].state == DONE;
            waiting += machine.fibers[i].state == AT_BARRIER;
        }
        if (done == threads) return;
        if (waiting < threads) {
            char text[160];
            snprintf(text, sizeof text, "block %u: %u of %u threads reached a barrier, %u ended, %u wait for their warp",
                     machine.block, waiting, threads, done, threads - waiting - done);
            machine.error = text;
            return;
        }
        for (uint32_t i = 0; i < threads; i++) {
            if (machine.fibers[i].line != machine.fibers[0].line) {
                machine.error = "threads of a block wait at barriers of different lines";
                return;
            }
            machine.fibers[i].state = READY;
        }
        machine.phase++;
    }
}

} // namespace shim

// Returns null, or what is wrong; the text lives until the next launch.
extern "C" const char *shim_launch(const char *name, uint32_t grid_x, uint32_t grid_y, uint32_t threads,
                                   void **arguments, const uint64_t *sizes, uint64_t count) {
    using namespace shim;
    machine.error.clear();
    auto found = registry().find(name);
    if (found == registry().end()) {
        machine.error = std::string("no kernel `") + name + "`";
        return machine.error.c_str();
    }
    const Registered &kernel = found->second;
    if (kernel.sizes.size() != count) {
        machine.error = std::string(name) + " takes " + std::to_string(kernel.sizes.size()) + " arguments, not " +
                        std::to_string(count);
        return machine.error.c_str();
    }
    for (uint64_t i = 0; i < count; i++) {
        if (kernel.sizes[i] != sizes[i]) {
            machine.error = std::string(name) + ": argument " + std::to_string(i) + " has " +
                            std::to_string(kernel.sizes[i]) + " bytes, not " + std::to_string(sizes[i]);
            return machine.error.c_str();
        }
    }
    if (threads == 0 || threads % 32 != 0 || threads > 256 || grid_x == 0 || grid_y == 0 || grid_y > 65535) {
        machine.error = std::string(name) + ": a launch of " + std::to_string(grid_x) + " x " + std::to_string(grid_y) +
                        " blocks of " + std::to_string(threads) + " threads";
        return machine.error.c_str();
    }
    machine.kernel = found->first.c_str();
    machine.launch++;
    machine.threads = threads;
    machine.grid_x = grid_x;
    machine.fibers.resize(256);
    machine.exchange.assign((size_t)threads * 32, 0);
    machine.parity.assign(threads, 0);
    static Body body;
    body = Body{kernel.run, arguments};
    machine.arguments = &body;
    machine.body = [](void *b) { ((Body *)b)->run(((Body *)b)->arguments); };
    for (uint32_t y = 0; y < grid_y; y++) {
        for (uint32_t x = 0; x < grid_x; x++) {
            machine.block = y * grid_x + x;
            machine.block_x = x;
            machine.block_y = y;
            run_block();
            if (!machine.error.empty()) return machine.error.c_str();
        }
    }
    return nullptr;
}

extern "C" shim::Buffer *shim_alloc(uint64_t bytes) {
    auto *b = new shim::Buffer{new unsigned char[bytes + 1], bytes, new shim::Trace[bytes / 2 + 1](), 0};
    // Every float of it is NaN: who reads what nobody wrote, shows it.
    memset(b->data, 0xff, bytes + 1);
    return b;
}
extern "C" void shim_free(shim::Buffer *b) {
    delete[] b->data;
    delete[] b->traces;
    delete b;
}
extern "C" unsigned char *shim_data(shim::Buffer *b) { return b->data; }

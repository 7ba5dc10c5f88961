// A driver without a card, for tests of what calls one: memory is the host's, launches know two kernels. VERSION,
// DEVICES, MAJOR and MEMORY are set when it is compiled, LOSE and REFUSE, the errors of a wait and of a launch, PENDING, how often
// work is not done yet (a million times are for ever), and GRAPHS, the error of making a graph. What was copied from page-locked
// memory must still stand there when the stream is waited for.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef LOSE
#define LOSE 0
#endif
#ifndef REFUSE
#define REFUSE 0
#endif
#ifndef PENDING
#define PENDING 3
#endif

#ifndef GRAPHS
#define GRAPHS 0
#endif

typedef void *handle;
typedef uint64_t pointer;

static _Atomic size_t used;
static _Thread_local handle current;
static _Thread_local long asked;

// What waits for work that does not end.
static void wait_for_work(void) {
    while (asked && PENDING >= 1000000) {
    }
}

int cuInit(unsigned flags) { return DEVICES ? 0 : 100; }
int cuDriverGetVersion(int *version) { return *version = VERSION, 0; }
int cuDeviceGetCount(int *count) { return DEVICES ? (*count = DEVICES, 0) : 3; }
int cuDeviceGet(int *device, int number) { return *device = number, number < DEVICES ? 0 : 101; }
int cuDeviceGetName(char *name, int size, int device) {
    if (size < 32) return 1;
    return strcpy(name, device ? "Second Card" : "First Card"), 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute == 75) return *value = MAJOR, 0;
    if (attribute == 76) return *value = 0, 0;
    return 1;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = MEMORY, 0; }
int cuDeviceGetUuid_v2(char uuid[16], int device) { return memset(uuid, device + 1, 16), 0; }
int cuDevicePrimaryCtxRetain(handle *context, int device) { return *context = (handle)(intptr_t)(device + 1), 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxSetCurrent(handle context) { return current = context, 0; }
int cuMemGetInfo_v2(size_t *free, size_t *total) { return *free = MEMORY - used, *total = MEMORY, current ? 0 : 201; }
int cuMemAlloc_v2(pointer *place, size_t bytes) {
    if (!current) return 201;
    if (bytes == 0) return 1;
    if (bytes > MEMORY - used) return 2;
    used += bytes;
    size_t *block = aligned_alloc(256, (bytes + 256 + 255) / 256 * 256);
    *block = bytes;
    memset((char *)block + 256, 0xff, bytes);
    return *place = (pointer)(uintptr_t)((char *)block + 256), 0;
}
int cuMemFree_v2(pointer place) {
    wait_for_work();
    size_t *block = (size_t *)((char *)(uintptr_t)place - 256);
    used -= *block;
    return free(block), 0;
}
// Page-locked memory, and what was copied from it and not waited for.
static struct { char *from; size_t bytes; char *copied; } locked[64], copies[64];
static int locked_count, copy_count;

static int capturing;

// Copies on the second stream: they happen when somebody waits for them.
struct beside { char *to; const char *from; size_t bytes; };
static struct beside besides[64];
static int beside_count;

static void copy_besides(void) {
    for (; beside_count; beside_count--) {
        const struct beside *b = &besides[beside_count - 1];
        memcpy(b->to, b->from, b->bytes);
    }
}

int cuMemAllocHost_v2(void **place, size_t bytes) {
    if (!current || !bytes || locked_count == 64) return 1;
    locked[locked_count].bytes = bytes;
    locked[locked_count].from = *place = malloc(bytes);
    return locked_count++, 0;
}
int cuMemFreeHost(void *place) {
    for (int i = 0; i < locked_count; i++) {
        if (locked[i].from == place) return locked[i] = locked[--locked_count], free(place), 0;
    }
    return 1;
}
int cuMemcpyHtoDAsync_v2(pointer to, const void *from, size_t bytes, handle stream) {
    if (stream == (handle)8) {
        if (beside_count == 64) return 1;
        return besides[beside_count++] = (struct beside){(char *)(uintptr_t)to, from, bytes}, 0;
    }
    for (int i = 0; i < locked_count; i++) {
        if ((char *)from < locked[i].from || (char *)from >= locked[i].from + locked[i].bytes) continue;
        if (copy_count == 64 || (char *)from + bytes > locked[i].from + locked[i].bytes) return 1;
        copies[copy_count].from = (char *)from;
        copies[copy_count].bytes = bytes;
        memcpy(copies[copy_count++].copied = malloc(bytes), from, bytes);
    }
    return memcpy((void *)(uintptr_t)to, from, bytes), stream ? 0 : 400;
}
int cuMemcpyDtoHAsync_v2(void *to, pointer from, size_t bytes, handle stream) {
    return memcpy(to, (void *)(uintptr_t)from, bytes), stream ? 0 : 400;
}
// Whether all that was copied is still as it was.
static int kept(void) {
    int same = 1;
    for (; copy_count; free(copies[copy_count].copied)) {
        copy_count--;
        same &= !memcmp(copies[copy_count].from, copies[copy_count].copied, copies[copy_count].bytes);
    }
    return same;
}
// The work, what goes beside it, and where launches are taken down.
int cuStreamCreate(handle *stream, unsigned flags) {
    static _Thread_local intptr_t made;
    return *stream = (handle)(7 + made++ % 3), flags == 1 && current ? 0 : 1;
}
int cuEventCreate(handle *event, unsigned flags) { return *event = malloc(sizeof(handle)), flags == 2 && current ? 0 : 1; }
int cuEventRecord(handle event, handle stream) { return *(handle *)event = stream, 0; }
int cuEventSynchronize(handle event) { return copy_besides(), 0; }
int cuEventDestroy_v2(handle event) { return free(event), 0; }
int cuStreamWaitEvent(handle stream, handle event, unsigned flags) {
    if (flags || *(handle *)event == stream) return 1;
    if (stream == (handle)7) copy_besides();
    return 0;
}
int cuStreamSynchronize(handle stream) {
    wait_for_work();
    if (stream == (handle)8) return copy_besides(), 0;
    if (stream == (handle)9) return 0;
    if (!kept()) return 1;
    return stream == (handle)7 ? LOSE : 400;
}
int cuStreamQuery(handle stream) {
    if (stream != (handle)7 || !current) return 400;
    if (asked++ < PENDING) return 600;
    return asked = 0, LOSE;
}
int cuStreamDestroy_v2(handle stream) { return stream >= (handle)7 && stream <= (handle)9 ? 0 : 400; }
int cuModuleLoadDataEx(handle *module, const void *image, unsigned count, int *options, void **values) {
    if (count == 2 && options[0] == 5 && options[1] == 6 && (uintptr_t)values[1] > 16) strcpy(values[0], "a log");
    // What the program brings, and nothing else.
    return *module = (handle)9, strstr(image, ".target sm_80") ? 0 : 218;
}
int cuModuleUnload(handle module) { return 0; }
int cuModuleGetFunction(handle *function, handle module, const char *name) {
    if (strcmp(name, "fill") == 0) return *function = (handle)1, 0;
    if (strcmp(name, "round_to_bf16") == 0) return *function = (handle)2, 0;
    return 500;
}
// A launch, and a list of them.
struct launch { handle function; uint64_t params[3]; };
struct graph { int count; struct launch launches[256]; };
static struct graph *taken;

static void run(const struct launch *launch) {
    int64_t count = (int64_t)launch->params[2];
    float *x = (float *)(uintptr_t)launch->params[0], value;
    memcpy(&value, &launch->params[1], 4);
    for (int64_t i = 0; i < count; i++) {
        if (launch->function == (handle)1) {
            x[i] = value;
        } else {
            uint32_t bits;
            memcpy(&bits, &x[i], 4);
            ((uint16_t *)(uintptr_t)launch->params[1])[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        }
    }
}
int cuLaunchKernel(handle function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, handle stream, void **params, void **extra) {
    if (!gx || gy != 1 || gz != 1 || bx != 256 || by != 1 || bz != 1 || shared || extra) return 1;
    if (stream != (handle)(capturing ? 9 : 7)) return 1;
    if (REFUSE) return REFUSE;
    struct launch launch = {function, {*(uint64_t *)params[0], 0, *(uint64_t *)params[2]}};
    memcpy(&launch.params[1], params[1], function == (handle)1 ? 4 : 8);
    if (!capturing) return run(&launch), 0;
    if (taken->count == 256) return 1;
    return taken->launches[taken->count++] = launch, 0;
}
int cuStreamBeginCapture_v2(handle stream, int mode) {
    if (capturing || mode != 1 || stream != (handle)9) return 1;
    taken = calloc(1, sizeof *taken);
    return capturing = 1, 0;
}
int cuStreamEndCapture(handle stream, handle *graph) {
    if (!capturing || stream != (handle)9) return 1;
    return capturing = 0, *graph = taken, 0;
}
int cuGraphInstantiateWithFlags(handle *exec, handle graph, uint64_t flags) {
    if (flags || GRAPHS) return GRAPHS ? GRAPHS : 1;
    return *exec = memcpy(malloc(sizeof *taken), graph, sizeof *taken), 0;
}
int cuGraphLaunch(handle exec, handle stream) {
    if (capturing || stream != (handle)7) return 1;
    const struct graph *graph = exec;
    for (int i = 0; i < graph->count; i++) run(&graph->launches[i]);
    return 0;
}
int cuGraphDestroy(handle graph) { return free(graph), 0; }
int cuGraphExecDestroy(handle exec) { return free(exec), 0; }
int cuGetErrorName(int error, const char **text) { return *text = "CUDA_ERROR_OF_A_TEST", 0; }
int cuGetErrorString(int error, const char **text) { return *text = "an error of a test", 0; }

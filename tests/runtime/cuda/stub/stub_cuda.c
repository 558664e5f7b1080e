/* A stub of libcuda for tests: it runs in host memory, records calls, fails on request and executes a few toy kernels.
 *
 * A toy cubin is the text "TOYCUBIN". Its functions:
 *   add_f32(x*, y*, out*, n)               out = x + y
 *   scale_f32(x*, out*, x_stride, n, factor) out[i] = factor * x[i * x_stride]
 *   accumulate_f32(x*, partial*, n)        partial += x        (first launch of a two-launch kernel over a workspace)
 *   finish_f32(partial*, out*, n)          out = partial       (second launch)
 *   append_i64(positions*, keys*, n)       keys[positions[i]] = positions[i] where positions[i] >= 0
 * Anything else launches without effect. While a stream is captured launches are kept and executed only by cuGraphLaunch.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_CALLS 16384
#define MAX_BUFFER 512
#define MAX_NODES 4096
#define STUB_MULTIPROCESSORS 4

typedef struct {
    char name[64];
    char detail[192];
    uint32_t grid[3], block[3], shared;
    uint8_t buffer[MAX_BUFFER];
    size_t size;
} Call;

typedef struct { char symbol[128]; } Function;
typedef struct { int is_memset; Function *function; uint8_t buffer[MAX_BUFFER]; size_t size; uint64_t address, bytes; } Node;
typedef struct { int count; Node nodes[MAX_NODES]; } Graph;
typedef struct { Graph *graph; int capturing; } Stream;

static Call calls[MAX_CALLS];
static int call_count = 0;
static char fail_name[64] = "";
static int fail_after = 0, fail_code = 0;
static int shared_limit = 232448;

void stub_reset(void) { call_count = 0; fail_name[0] = 0; shared_limit = 232448; }
void stub_fail(const char *name, int nth, int code) { snprintf(fail_name, sizeof fail_name, "%s", name); fail_after = nth; fail_code = code; }
int stub_count(void) { return call_count; }
const Call *stub_call(int index) { return &calls[index]; }
void stub_set_shared_limit(int bytes) { shared_limit = bytes; }

static Call *record(const char *name) {
    Call *call = &calls[call_count < MAX_CALLS - 1 ? call_count++ : MAX_CALLS - 1];
    memset(call, 0, sizeof *call);
    snprintf(call->name, sizeof call->name, "%s", name);
    return call;
}

static int failing(const char *name) {
    if (strcmp(name, fail_name) != 0) return 0;
    if (--fail_after > 0) return 0;
    fail_name[0] = 0;
    return fail_code;
}

#define ENTER(name) Call *call = record(name); int failed = failing(name); (void)call; if (failed) return failed

static uint64_t pointer_at(const uint8_t *buffer, size_t offset) { uint64_t value; memcpy(&value, buffer + offset, 8); return value; }
static int32_t integer_at(const uint8_t *buffer, size_t offset) { int32_t value; memcpy(&value, buffer + offset, 4); return value; }

static void execute(const Node *node) {
    const uint8_t *b = node->buffer;
    if (node->is_memset) { memset((void *)node->address, 0, node->bytes); return; }
    const char *symbol = node->function->symbol;
    if (!strcmp(symbol, "add_f32")) {
        float *x = (float *)pointer_at(b, 0), *y = (float *)pointer_at(b, 8), *out = (float *)pointer_at(b, 16);
        for (int i = 0, n = integer_at(b, 24); i < n; i++) out[i] = x[i] + y[i];
    } else if (!strcmp(symbol, "scale_f32")) {
        float *x = (float *)pointer_at(b, 0), *out = (float *)pointer_at(b, 8);
        int stride = integer_at(b, 16), n = integer_at(b, 20), factor = integer_at(b, 24);
        for (int i = 0; i < n; i++) out[i] = (float)factor * x[(int64_t)i * stride];
    } else if (!strcmp(symbol, "accumulate_f32")) {
        float *x = (float *)pointer_at(b, 0), *partial = (float *)pointer_at(b, 8);
        for (int i = 0, n = integer_at(b, 16); i < n; i++) partial[i] += x[i];
    } else if (!strcmp(symbol, "finish_f32")) {
        float *partial = (float *)pointer_at(b, 0), *out = (float *)pointer_at(b, 8);
        for (int i = 0, n = integer_at(b, 16); i < n; i++) out[i] = partial[i];
    } else if (!strcmp(symbol, "append_i64")) {
        int64_t *positions = (int64_t *)pointer_at(b, 0), *keys = (int64_t *)pointer_at(b, 8);
        for (int i = 0, n = integer_at(b, 16); i < n; i++) if (positions[i] >= 0) keys[positions[i]] = positions[i];
    }
}

static int submit(Stream *stream, const Node *node) {
    if (stream && stream->capturing) {
        if (stream->graph->count >= MAX_NODES) return 2;
        stream->graph->nodes[stream->graph->count++] = *node;
    } else execute(node);
    return 0;
}

int cuInit(unsigned flags) { (void)flags; ENTER("cuInit"); return 0; }
int cuDeviceGet(int *device, int ordinal) { ENTER("cuDeviceGet"); if (ordinal != 0) return 101; *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    ENTER("cuDeviceGetAttribute");
    switch (attribute) {
    case 75: *value = 9; break;
    case 76: *value = 0; break;
    case 97: *value = shared_limit; break;
    case 16: *value = STUB_MULTIPROCESSORS; break;
    default: return 1;
    }
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; ENTER("cuDevicePrimaryCtxRetain"); *context = (void *)0x1000; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; ENTER("cuDevicePrimaryCtxRelease_v2"); return 0; }
int cuCtxSetCurrent(void *context) { ENTER("cuCtxSetCurrent"); return context == (void *)0x1000 ? 0 : 201; }
int cuModuleLoadData(void **module, const char *image) {
    ENTER("cuModuleLoadData");
    if (strncmp(image, "TOYCUBIN", 8) != 0) return 200;
    *module = malloc(8);
    return 0;
}
int cuModuleUnload(void *module) { ENTER("cuModuleUnload"); free(module); return 0; }
int cuModuleGetFunction(void **function, void *module, const char *symbol) {
    (void)module;
    ENTER("cuModuleGetFunction");
    snprintf(call->detail, sizeof call->detail, "%s", symbol);
    if (!strncmp(symbol, "missing", 7)) return 500;
    Function *made = calloc(1, sizeof *made);
    snprintf(made->symbol, sizeof made->symbol, "%s", symbol);
    *function = made;
    return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    ENTER("cuFuncSetAttribute");
    snprintf(call->detail, sizeof call->detail, "%s %d %d", ((Function *)function)->symbol, attribute, value);
    return 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *stream,
                   void **parameters, void **extra) {
    ENTER("cuLaunchKernel");
    Node node = {0};
    node.function = function;
    snprintf(call->detail, sizeof call->detail, "%s", node.function->symbol);
    call->grid[0] = gx; call->grid[1] = gy; call->grid[2] = gz;
    call->block[0] = bx; call->block[1] = by; call->block[2] = bz;
    call->shared = shared;
    if (parameters || (uintptr_t)extra[0] != 1 || (uintptr_t)extra[2] != 2 || (uintptr_t)extra[4] != 0) return 1;
    node.size = *(size_t *)extra[3];
    if (node.size > MAX_BUFFER) return 1;
    memcpy(node.buffer, extra[1], node.size);
    memcpy(call->buffer, extra[1], node.size);
    call->size = node.size;
    return submit(stream, &node);
}
int cuStreamCreate(void **stream, unsigned flags) { (void)flags; ENTER("cuStreamCreate"); *stream = calloc(1, sizeof(Stream)); return 0; }
int cuStreamSynchronize(void *stream) { ENTER("cuStreamSynchronize"); return ((Stream *)stream)->capturing ? 900 : 0; }
int cuStreamDestroy_v2(void *stream) { ENTER("cuStreamDestroy_v2"); free(stream); return 0; }
int cuStreamBeginCapture_v2(void *handle, int mode) {
    ENTER("cuStreamBeginCapture_v2");
    snprintf(call->detail, sizeof call->detail, "%d", mode);
    Stream *stream = handle;
    if (stream->capturing) return 900;
    stream->capturing = 1;
    stream->graph = calloc(1, sizeof(Graph));
    return 0;
}
int cuStreamEndCapture(void *handle, void **graph) {
    ENTER("cuStreamEndCapture");
    Stream *stream = handle;
    if (!stream->capturing) return 901;
    stream->capturing = 0;
    *graph = stream->graph;
    return 0;
}
int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
    (void)flags;
    ENTER("cuGraphInstantiateWithFlags");
    snprintf(call->detail, sizeof call->detail, "%d", ((Graph *)graph)->count);
    Graph *copy = malloc(sizeof *copy);
    *copy = *(Graph *)graph;
    *executable = copy;
    return 0;
}
int cuGraphLaunch(void *executable, void *stream) {
    (void)stream;
    ENTER("cuGraphLaunch");
    Graph *graph = executable;
    snprintf(call->detail, sizeof call->detail, "%d", graph->count);
    for (int i = 0; i < graph->count; i++) execute(&graph->nodes[i]);
    return 0;
}
int cuGraphExecDestroy(void *executable) { ENTER("cuGraphExecDestroy"); free(executable); return 0; }
int cuGraphDestroy(void *graph) { ENTER("cuGraphDestroy"); free(graph); return 0; }
int cuMemAlloc_v2(uint64_t *address, size_t bytes) { ENTER("cuMemAlloc_v2"); *address = (uint64_t)malloc(bytes); return 0; }
int cuMemFree_v2(uint64_t address) { ENTER("cuMemFree_v2"); free((void *)address); return 0; }
int cuMemcpyHtoD_v2(uint64_t address, const void *host, size_t bytes) { ENTER("cuMemcpyHtoD_v2"); memcpy((void *)address, host, bytes); return 0; }
int cuMemcpyDtoH_v2(void *host, uint64_t address, size_t bytes) { ENTER("cuMemcpyDtoH_v2"); memcpy(host, (void *)address, bytes); return 0; }
int cuMemsetD8Async(uint64_t address, unsigned char value, size_t bytes, void *stream) {
    ENTER("cuMemsetD8Async");
    Node node = {0};
    if (value != 0) return 1;
    node.is_memset = 1; node.address = address; node.bytes = bytes;
    return submit(stream, &node);
}

static const struct { int code; const char *name, *text; } ERRORS[] = {
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
};
static int describe(int code, const char **text, int name) {
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].code == code) { *text = name ? ERRORS[i].name : ERRORS[i].text; return 0; }
    *text = NULL;
    return 1;
}
int cuGetErrorName(int code, const char **text) { return describe(code, text, 1); }
int cuGetErrorString(int code, const char **text) { return describe(code, text, 0); }

// A stand-in for libcudart.so.13, the CUDA runtime: what PyTorch calls of it, over the device of device.h. Kernels do
// nothing. The rules of stream capture hold. What is exported by the real library and is not here returns 0 (see build.py).

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <time.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "device.h"

using namespace stand_in;

namespace {

struct Event {
    unsigned flags = 0;
    double recorded_ms = 0;
    bool captured = false;
};

struct LaunchConfiguration {
    dim3 grid, block;
    size_t shared_bytes;
    cudaStream_t stream;
};

thread_local std::vector<LaunchConfiguration> configurations;

double now_ms() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
}

Event* event_of(cudaEvent_t handle) { return reinterpret_cast<Event*>(handle); }

Graph* graph_of(cudaGraph_t handle) { return reinterpret_cast<Graph*>(handle); }

Graph* graph_of(cudaGraphExec_t handle) { return reinterpret_cast<Graph*>(handle); }

cudaError_t refuse(const char* call) { return fail(cudaErrorStreamCaptureUnsupported, call); }

// A copy or fill: done now, or noted where the stream is captured.
template <typename Work>
cudaError_t perform(Stream* stream, Work work) {
    if (stream->status == cudaStreamCaptureStatusInvalidated)
        return fail(cudaErrorStreamCaptureInvalidated, "copy in a spoilt capture");
    if (stream->capturing())
        stream->graph->copies.push_back(work);
    else
        work();
    return cudaSuccess;
}

cudaError_t launch_kernel(const char* function, cudaStream_t stream) {
    enter(function);
    return launch(stream_of(stream));
}

int not_there() { return cudaErrorNotSupported; }

}  // namespace

extern "C" {

// ---- errors

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorInvalidResourceHandle: return "invalid resource handle";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
        case cudaErrorStreamCaptureImplicit: return "operation would make the legacy stream depend on a capturing blocking stream";
        case cudaErrorStreamCaptureWrongThread:
            return "attempt to terminate a thread-local capture sequence from another thread";
        case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
        default: return "an error of the stand-in";
    }
}

const char* cudaGetErrorName(cudaError_t error) { return error ? "cudaErrorOfTheStandIn" : "cudaSuccess"; }

cudaError_t cudaGetLastError() { return last_error(true); }

cudaError_t cudaPeekAtLastError() { return last_error(false); }

// ---- devices

cudaError_t cudaGetDeviceCount(int* count) {
    initialise();
    *count = device_count();
    return *count ? cudaSuccess : fail(cudaErrorNoDevice, "no device is visible");
}

cudaError_t cudaGetDevice(int* device) {
    *device = current_device();
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    initialise();
    if (device < 0 || device >= device_count()) return fail(cudaErrorInvalidDevice, "no such device");
    set_current_device(device);
    enter("cudaSetDevice");
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = DRIVER_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    enter("cudaDeviceSynchronize");
    return is_forbidden("cudaDeviceSynchronize") ? refuse("cudaDeviceSynchronize") : cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    enter("cudaMemGetInfo");
    *total = TOTAL_MEMORY;
    *free = free_memory(current_device());
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    initialise();
    *properties = {};
    strcpy(properties->name, NAME);
    device_uuid(device, properties->uuid.bytes);
    properties->pciBusID = device_number(device) + 1;
    properties->totalGlobalMem = TOTAL_MEMORY;
    properties->major = CAPABILITY_MAJOR;
    properties->minor = CAPABILITY_MINOR;
    properties->multiProcessorCount = MULTIPROCESSORS;
    properties->sharedMemPerBlock = SHARED_MEMORY_PER_BLOCK;
    properties->sharedMemPerBlockOptin = SHARED_MEMORY_OPT_IN;
    properties->sharedMemPerMultiprocessor = SHARED_MEMORY_PER_SM;
    properties->regsPerBlock = properties->regsPerMultiprocessor = REGISTERS;
    properties->warpSize = WARP;
    properties->maxThreadsPerBlock = THREADS_PER_BLOCK;
    properties->maxThreadsPerMultiProcessor = THREADS_PER_SM;
    properties->maxBlocksPerMultiProcessor = 32;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = INT32_MAX;
    properties->maxGridSize[1] = properties->maxGridSize[2] = UINT16_MAX;
    properties->totalConstMem = 65536;
    properties->textureAlignment = 512;
    properties->memoryBusWidth = MEMORY_BUS_BITS;
    properties->l2CacheSize = L2_BYTES;
    properties->asyncEngineCount = 3;
    properties->concurrentKernels = properties->ECCEnabled = properties->unifiedAddressing = 1;
    properties->managedMemory = properties->memoryPoolsSupported = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
        case cudaDevAttrComputeCapabilityMajor: *value = CAPABILITY_MAJOR; break;
        case cudaDevAttrComputeCapabilityMinor: *value = CAPABILITY_MINOR; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = THREADS_PER_BLOCK; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = THREADS_PER_SM; break;
        case cudaDevAttrWarpSize: *value = WARP; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED_MEMORY_PER_BLOCK; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED_MEMORY_OPT_IN; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = SHARED_MEMORY_PER_SM; break;
        case cudaDevAttrMaxGridDimX: *value = INT32_MAX; break;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: *value = UINT16_MAX; break;
        case cudaDevAttrMaxBlockDimX:
        case cudaDevAttrMaxBlockDimY: *value = 1024; break;
        case cudaDevAttrMaxBlockDimZ: *value = 64; break;
        case cudaDevAttrComputeMode: *value = cudaComputeModeDefault; break;
        default: *value = 1;  // a capability, which it has
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
    device_pci_bus(device, text, size);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
    *pool = reinterpret_cast<cudaMemPool_t>(1);
    return cudaSuccess;
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
    memset(value, 0, sizeof(uint64_t));
    return cudaSuccess;
}

// ---- memory

cudaError_t cudaMalloc(void** pointer, size_t size) {
    enter("cudaMalloc");
    return is_forbidden("cudaMalloc") ? refuse("cudaMalloc") : allocate(pointer, size, false);
}

cudaError_t cudaFree(void* pointer) {
    enter("cudaFree");
    if (!pointer) return cudaSuccess;
    return is_forbidden("cudaFree") ? refuse("cudaFree") : release(pointer);
}

cudaError_t cudaMallocAsync(void** pointer, size_t size, cudaStream_t) { return allocate(pointer, size, false); }

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return release(pointer); }

cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
    enter("cudaHostAlloc");
    return is_forbidden("cudaHostAlloc") ? refuse("cudaHostAlloc") : allocate(pointer, size, true);
}

cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
    const Place place = place_of(pointer);
    *attributes = {};
    attributes->device = place.device;
    attributes->type = cudaMemoryTypeUnregistered;
    if (!place.known) return cudaSuccess;
    attributes->type = place.on_host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    attributes->devicePointer = const_cast<void*>(pointer);
    if (place.on_host) attributes->hostPointer = const_cast<void*>(pointer);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
    enter("cudaMemcpyAsync");
    Stream* const on = stream_of(stream);
    if (on->capturing() && !(place_of(to).known && place_of(from).known)) {
        spoil(on, "a copy of memory that is not pinned");
        return refuse("a copy of memory that is not pinned");
    }
    return perform(on, [=] { memmove(to, from, size); });
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    enter("cudaMemcpy");
    if (is_forbidden("cudaMemcpy")) return refuse("cudaMemcpy");
    memmove(to, from, size);
    return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(
    void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream
) {
    enter("cudaMemcpy2DAsync");
    return perform(stream_of(stream), [=] {
        for (size_t row = 0; row < height; ++row)
            memmove(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
    });
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream);
}

cudaError_t cudaMemsetAsync(void* at, int value, size_t size, cudaStream_t stream) {
    enter("cudaMemsetAsync");
    return perform(stream_of(stream), [=] { memset(at, value, size); });
}

cudaError_t cudaMemset(void* at, int value, size_t size) { return cudaMemsetAsync(at, value, size, nullptr); }

cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
    static char symbols[1 << 20];
    *pointer = symbols;
    return cudaSuccess;
}

// ---- memory and events between processes

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* pointer) { return export_memory(pointer, handle); }

cudaError_t cudaIpcOpenMemHandle(void** pointer, cudaIpcMemHandle_t handle, unsigned) {
    enter("cudaIpcOpenMemHandle");
    return is_forbidden("cudaIpcOpenMemHandle") ? refuse("cudaIpcOpenMemHandle") : import_memory(handle, pointer);
}

cudaError_t cudaIpcCloseMemHandle(void* pointer) { return release(pointer); }

cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* handle, cudaEvent_t event) {
    *handle = {};
    const bool shared = event_of(event)->flags & cudaEventInterprocess;
    return shared ? cudaSuccess : fail(cudaErrorInvalidResourceHandle, "the event is not for other processes");
}

cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* event, cudaIpcEventHandle_t) {
    enter("cudaIpcOpenEventHandle");
    *event = reinterpret_cast<cudaEvent_t>(new Event{cudaEventInterprocess});
    return cudaSuccess;
}

// ---- streams and events: all work is done as it is launched

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
    enter("cudaStreamCreateWithPriority");
    *stream = reinterpret_cast<cudaStream_t>(new_stream(current_device(), flags, priority));
    return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
    *priority = stream_of(stream)->priority;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    enter("cudaStreamSynchronize");
    if (!stream_of(stream)->capturing()) return cudaSuccess;
    spoil(stream_of(stream), "cudaStreamSynchronize");
    return refuse("cudaStreamSynchronize");
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    if (!stream_of(stream)->capturing()) return cudaSuccess;
    spoil(stream_of(stream), "cudaStreamQuery");
    return refuse("cudaStreamQuery");
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned) {
    callback(stream, cudaSuccess, data);
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
    function(data);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    enter("cudaEventCreateWithFlags");
    *event = reinterpret_cast<cudaEvent_t>(new Event{flags});
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event_of(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    event_of(event)->recorded_ms = now_ms();
    event_of(event)->captured = stream_of(stream)->capturing();
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (is_forbidden("cudaEventQuery")) return refuse("cudaEventQuery");
    return event_of(event)->captured ? fail(cudaErrorCapturedEvent, "cudaEventQuery") : cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    delay("cudaEventSynchronize");
    return event_of(event)->captured ? fail(cudaErrorCapturedEvent, "cudaEventSynchronize") : cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    *milliseconds = static_cast<float>(event_of(end)->recorded_ms - event_of(begin)->recorded_ms);
    return cudaSuccess;
}

// ---- captures and graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    enter("cudaStreamBeginCapture");
    return begin_capture(stream_of(stream), mode);
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    return end_capture(stream_of(stream), reinterpret_cast<Graph**>(graph));
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    *status = stream_of(stream)->status;
    const bool blocked = is_blocked_by_capture(stream_of(stream));
    return blocked ? fail(cudaErrorStreamCaptureImplicit, "the default stream beside a capture") : cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* capture, cudaGraph_t* graph,
    const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges, size_t* count
) {
    const Stream* const on = stream_of(stream);
    *status = on->status;
    if (capture) *capture = on->capture;
    if (graph) *graph = reinterpret_cast<cudaGraph_t>(on->graph);
    if (dependencies) *dependencies = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    *mode = exchange_mode(*mode);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    delay("cudaGraphInstantiateWithFlags");
    *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*graph_of(graph)));
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph_of(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete graph_of(executable);
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
    *count = graph_of(graph)->kernels + graph_of(graph)->copies.size();
    return cudaSuccess;
}

cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
    *count = 0;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
    enter("cudaGraphLaunch");
    for (const auto& copy : graph_of(executable)->copies) copy();
    return cudaSuccess;
}

// ---- kernels

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream) {
    configurations.push_back({grid, block, shared_bytes, stream});
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
    const LaunchConfiguration configuration = configurations.back();
    configurations.pop_back();
    *grid = configuration.grid;
    *block = configuration.block;
    *shared_bytes = configuration.shared_bytes;
    *static_cast<cudaStream_t*>(stream) = configuration.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t stream) {
    return launch_kernel("cudaLaunchKernel", stream);
}

cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) {
    return launch_kernel("cudaLaunchKernel", stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void*, void**) {
    return launch_kernel("cudaLaunchKernel", configuration->stream);
}

void** __cudaRegisterFatBinary(void*) {
    static void* handle[2];
    return handle;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = {};
    attributes->maxThreadsPerBlock = THREADS_PER_BLOCK;
    attributes->numRegs = 64;
    attributes->binaryVersion = attributes->ptxVersion = CAPABILITY_MAJOR * 10 + CAPABILITY_MINOR;
    attributes->maxDynamicSharedSizeBytes = SHARED_MEMORY_OPT_IN;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
    *blocks = 2;
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result
) {
    void* const driver = dlopen("libcuda.so.1", RTLD_LAZY);
    *function = driver ? dlsym(driver, name) : nullptr;
    if (!*function) *function = reinterpret_cast<void*>(not_there);
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

}  // extern "C"

// A stand-in for libcuda.so.1, the CUDA driver: what cuda_probe.py, the driver's Python bindings and Triton call of it, over
// the device of device.h, which is in libcudart.so.13 beside it. Kernels do nothing.

#define CUDA_ENABLE_DEPRECATED
#include <cuda.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "device.h"

// cuda.h names the newest version of each of these; the older are exported as well
#undef cuCtxPopCurrent
#undef cuCtxPushCurrent
#undef cuDeviceGetUuid
#undef cuDevicePrimaryCtxRelease
#undef cuDeviceTotalMem
#undef cuGetProcAddress
#undef cuMemGetInfo

using namespace stand_in;

namespace {

constexpr unsigned LEAST_PIECE = 8;  // an H200's multiprocessors are divided into eights

struct GreenContext {
    int number, device, multiprocessors;
};

CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(static_cast<uintptr_t>(device + 1)); }

CUresult not_there() { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult launch_kernel(CUstream stream) {
    enter("cuLaunchKernel");
    return static_cast<CUresult>(launch(stream_of(stream)));
}

int attribute(CUdevice_attribute attribute) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return MULTIPROCESSORS;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return CAPABILITY_MAJOR;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return CAPABILITY_MINOR;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return THREADS_PER_BLOCK;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return THREADS_PER_SM;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return WARP;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return SHARED_MEMORY_PER_BLOCK;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return SHARED_MEMORY_OPT_IN;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return SHARED_MEMORY_PER_SM;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return REGISTERS;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return CLOCK_KHZ;
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return MEMORY_CLOCK_KHZ;
        case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return MEMORY_BUS_BITS;
        case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return L2_BYTES;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_MODE: return CU_COMPUTEMODE_DEFAULT;
        default: return 0;
    }
}

}  // namespace

extern "C" {

// ---- the driver and its devices

CUresult cuInit(unsigned) {
    initialise();
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
    *version = DRIVER_VERSION;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
    if (!is_initialised()) return CUDA_ERROR_NOT_INITIALIZED;
    *count = device_count();
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int place) {
    if (!is_initialised()) return CUDA_ERROR_NOT_INITIALIZED;
    if (place < 0 || place >= device_count()) return CUDA_ERROR_INVALID_DEVICE;
    *device = place;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int size, CUdevice) {
    snprintf(name, size, "%s", NAME);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
    device_uuid(device, uuid->bytes);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }

CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) {
    *bytes = TOTAL_MEMORY;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
    *value = attribute(which);
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    *text = error ? "an error of the stand-in" : "no error";
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** name) {
    *name = error ? "CUDA_ERROR_OF_THE_STAND_IN" : "CUDA_SUCCESS";
    return CUDA_SUCCESS;
}

CUresult cuGetProcAddress_v2(const char* name, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult* result) {
    static void* const self = [] {
        Dl_info found;
        dladdr(reinterpret_cast<void*>(cuInit), &found);
        return dlopen(found.dli_fname, RTLD_LAZY);
    }();
    *function = nullptr;
    for (const char* version : {"_v4", "_v3", "_v2", ""}) {
        char versioned[256];
        snprintf(versioned, sizeof versioned, "%s%s", name, version);
        if ((*function = dlsym(self, versioned))) break;
    }
    if (result) *result = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    if (!*function) *function = reinterpret_cast<void*>(not_there);
    return CUDA_SUCCESS;
}

CUresult cuGetProcAddress(const char* name, void** function, int version, cuuint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}

// ---- contexts: a device's primary one is all there is

CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = has_context(current_device()) ? context_of(current_device()) : nullptr;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }

CUresult cuCtxPushCurrent_v2(CUcontext) { return CUDA_SUCCESS; }

CUresult cuCtxPopCurrent_v2(CUcontext* context) { return context ? cuCtxGetCurrent(context) : CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice* device) {
    *device = current_device();
    return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    make_context(device);
    *context = context_of(device);
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
    *flags = 0;
    *active = has_context(device);
    return CUDA_SUCCESS;
}

// ---- memory

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *static_cast<CUdeviceptr*>(value) = pointer;
    else
        *static_cast<int*>(value) = 0;
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    *total = TOTAL_MEMORY;
    *free = free_memory(current_device());
    return CUDA_SUCCESS;
}

// ---- green contexts

CUresult cuDeviceGetDevResource(CUdevice, CUdevResource* resource, CUdevResourceType type) {
    if (type != CU_DEV_RESOURCE_TYPE_SM) return CUDA_ERROR_INVALID_RESOURCE_TYPE;
    memset(resource, 0, sizeof *resource);
    resource->type = type;
    resource->sm.smCount = MULTIPROCESSORS;
    return CUDA_SUCCESS;
}

CUresult cuDevSmResourceSplitByCount(
    CUdevResource* pieces, unsigned* count, const CUdevResource* whole, CUdevResource* rest, unsigned, unsigned least
) {
    const unsigned size = least < LEAST_PIECE ? LEAST_PIECE : (least + LEAST_PIECE - 1) / LEAST_PIECE * LEAST_PIECE;
    const unsigned possible = whole->sm.smCount / size;
    if (!possible) return CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION;
    if (*count > possible) *count = possible;
    for (unsigned piece = 0; pieces && piece < *count; ++piece) {
        pieces[piece] = *whole;
        pieces[piece].sm.smCount = size;
    }
    if (!rest) return CUDA_SUCCESS;
    *rest = *whole;
    rest->sm.smCount = whole->sm.smCount - *count * size;
    if (!rest->sm.smCount) rest->type = CU_DEV_RESOURCE_TYPE_INVALID;
    return CUDA_SUCCESS;
}

CUresult cuDevResourceGenerateDesc(CUdevResourceDesc* description, CUdevResource* resources, unsigned count) {
    if (count != 1 || resources->type != CU_DEV_RESOURCE_TYPE_SM) return CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION;
    *description = reinterpret_cast<CUdevResourceDesc>(new CUdevResource(*resources));
    return CUDA_SUCCESS;
}

CUresult cuGreenCtxCreate(CUgreenCtx* context, CUdevResourceDesc description, CUdevice device, unsigned flags) {
    static int contexts = 0;
    if (flags != CU_GREEN_CTX_DEFAULT_STREAM) return CUDA_ERROR_INVALID_VALUE;
    if (is_refused("cuGreenCtxCreate")) return CUDA_ERROR_NOT_PERMITTED;
    make_context(device);
    const int multiprocessors = static_cast<int>(reinterpret_cast<CUdevResource*>(description)->sm.smCount);
    *context = reinterpret_cast<CUgreenCtx>(new GreenContext{++contexts, device, multiprocessors});
    log("green context %d of %d multiprocessors", contexts, multiprocessors);
    return CUDA_SUCCESS;
}

CUresult cuGreenCtxDestroy(CUgreenCtx context) {
    const GreenContext* const green = reinterpret_cast<GreenContext*>(context);
    log("green context %d is given up", green->number);
    delete green;
    return CUDA_SUCCESS;
}

CUresult cuGreenCtxStreamCreate(CUstream* stream, CUgreenCtx context, unsigned flags, int priority) {
    if (flags != CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
    const GreenContext* const green = reinterpret_cast<GreenContext*>(context);
    *stream = reinterpret_cast<CUstream>(
        new_stream(green->device, flags, priority, green->number, green->multiprocessors));
    return CUDA_SUCCESS;
}

// ---- what Triton calls of a kernel that it has compiled

CUresult cuModuleLoadData(CUmodule* module, const void*) {
    *module = reinterpret_cast<CUmodule>(1);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char*) {
    *function = reinterpret_cast<CUfunction>(1);
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? THREADS_PER_BLOCK : 0;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }

CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
    *clusters = 1;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* configuration, CUfunction, void**, void**) {
    return launch_kernel(configuration->hStream);
}

CUresult cuLaunchKernel(
    CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream stream, void**, void**
) {
    return launch_kernel(stream);
}

}  // extern "C"

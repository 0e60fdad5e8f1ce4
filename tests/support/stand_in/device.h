// The GPU behind the stand-ins for CUDA's libraries: its memory, streams and captures, what it logs and where it is slow.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace stand_in {

constexpr size_t TOTAL_MEMORY = 150754820096;        // bytes, of an H200
constexpr size_t CONTEXT_MEMORY = size_t{512} << 20;  // bytes that each process takes of each device it uses
constexpr int MULTIPROCESSORS = 132;
constexpr int CAPABILITY_MAJOR = 9, CAPABILITY_MINOR = 0;
constexpr int DRIVER_VERSION = 13000;
constexpr int SHARED_MEMORY_PER_BLOCK = 49152, SHARED_MEMORY_OPT_IN = 232448, SHARED_MEMORY_PER_SM = 233472;
constexpr int REGISTERS = 65536, THREADS_PER_BLOCK = 1024, THREADS_PER_SM = 2048, WARP = 32;
constexpr int MEMORY_BUS_BITS = 6144, L2_BYTES = 62914560;
constexpr int CLOCK_KHZ = 1980000, MEMORY_CLOCK_KHZ = 3201000;
constexpr const char* NAME = "NVIDIA H200 (stand-in)";

// Work that was captured: how many kernels, and the copies, which are made anew at every launch.
struct Graph {
    long kernels = 0;
    std::vector<std::function<void()>> copies;
};

struct Stream {
    int device = 0;
    unsigned flags = 0;
    int priority = 0;  // the lower, the sooner
    int green_context = 0;  // its number; 0: none
    int multiprocessors = MULTIPROCESSORS;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    unsigned long long capture = 0;  // the capture's number
    long owner = 0;                  // the thread that began it
    Graph* graph = nullptr;

    bool capturing() const { return status != cudaStreamCaptureStatusNone; }
};

// Appends a line to the log: seconds, process, thread, the process's name, the text.
void log(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Waits as long as SPLITWISER_STAND_IN_DELAY says for this function.
void delay(const char* function);

// Whether SPLITWISER_STAND_IN_REFUSED names this function: it then fails, as what a sandbox does not permit.
bool is_refused(const char* function);

// ---- devices and contexts; a device is meant by its place among those that CUDA_VISIBLE_DEVICES leaves

void initialise();  // what cuInit does
bool is_initialised();
int device_count();
int device_number(int device);  // its place among all
void device_uuid(int device, char* bytes);
void device_pci_bus(int device, char* text, int size);
int current_device();
void set_current_device(int device);
bool has_context(int device);
void make_context(int device);

// What every call does that needs a context: makes that of the current device, and waits as long as `function` is to take.
void enter(const char* function);

// ---- errors

cudaError_t fail(cudaError_t error, const char* why);  // logged, and kept as the thread's last error
cudaError_t last_error(bool clear);

// ---- memory: the host's, in files without a name, so that another process can map it too

cudaError_t allocate(void** pointer, size_t size, bool on_host);
cudaError_t release(void* pointer);
size_t free_memory(int device);  // over all processes

struct Place {
    bool known, on_host;
    int device;
};
Place place_of(const void* pointer);

cudaError_t export_memory(const void* pointer, cudaIpcMemHandle_t* handle);
cudaError_t import_memory(const cudaIpcMemHandle_t& handle, void** pointer);

// ---- streams and captures

Stream* new_stream(int device, unsigned flags, int priority, int green_context = 0, int multiprocessors = MULTIPROCESSORS);
Stream* stream_of(cudaStream_t handle);  // of 0, 1 and 2 the device's default stream
bool is_default(const Stream* stream);

// Whether captures under way forbid `call`, which a capture cannot hold; if so they are spoilt (see CUDA's documentation of
// cudaThreadExchangeStreamCaptureMode).
bool is_forbidden(const char* call);
void spoil(Stream* stream, const char* call);

cudaError_t launch(Stream* stream);
cudaError_t begin_capture(Stream* stream, cudaStreamCaptureMode mode);
cudaError_t end_capture(Stream* stream, Graph** graph);
bool is_blocked_by_capture(const Stream* stream);  // the default stream, beside a capture on a stream that waits for it
cudaStreamCaptureMode exchange_mode(cudaStreamCaptureMode mode);

}  // namespace stand_in

#include "device.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace stand_in {
namespace {

constexpr int MOST_DEVICES = 8, MOST_PROCESSES = 256;
constexpr size_t PAGE = 4096;
constexpr long HANDLE_MARK = 0x57A4D14;

// What a process holds of each device. A process that has ended holds nothing, however it ended.
struct Holding {
    std::atomic<int> process;
    std::atomic<size_t> bytes[MOST_DEVICES];
};

struct Block {
    size_t size;
    int file;
    bool on_host;
    int device;
    bool imported;  // another process's: it holds it
};

// What stands in a cudaIpcMemHandle_t.
struct Handle {
    long mark;
    int process, file, device_number;
    size_t size;
};

std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;
std::map<char*, Block> blocks;
std::vector<Stream*> capturing;
unsigned long long captures = 0;
bool initialised = false;
int process_of_contexts = 0;
bool contexts[MOST_DEVICES] = {};
Stream default_streams[MOST_DEVICES];

thread_local cudaError_t thread_error = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local int thread_device = 0;

long thread_id() { return syscall(SYS_gettid); }

std::string setting(const char* name, const char* otherwise) {
    const char* value = std::getenv(name);
    return value ? value : otherwise;
}

std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> parts;
    for (size_t begin = 0; begin < text.size();) {
        const size_t end = std::min(text.find(',', begin), text.size());
        parts.push_back(text.substr(begin, end - begin));
        begin = end + 1;
    }
    return parts;
}

std::string in_folder(const char* name) {
    const std::string folder = setting("SPLITWISER_STAND_IN_FOLDER", "");
    return folder.empty() ? folder : folder + "/" + name;
}

FILE* open_log() {
    FILE* file = fopen(in_folder("log").c_str(), "a");
    if (file) setlinebuf(file);
    return file;
}

// The table of what processes hold, in a file that all of them map; without a folder, this process's alone.
Holding* holdings() {
    static Holding* table = [] {
        const size_t size = sizeof(Holding) * MOST_PROCESSES;
        int file = open(in_folder("memory").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        if (file >= 0 && ftruncate(file, size)) abort();
        const int flags = file >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
        void* mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, file, 0);
        if (mapped == MAP_FAILED) abort();
        return static_cast<Holding*>(mapped);
    }();
    return table;
}

bool has_ended(int process) { return kill(process, 0) && errno == ESRCH; }

Holding& own_holding() {
    static Holding* own = nullptr;
    if (own && own->process == getpid()) return *own;
    for (int place = 0; place < MOST_PROCESSES; ++place) {
        Holding& each = holdings()[place];
        int holder = each.process;
        if (holder && !has_ended(holder)) continue;
        if (!each.process.compare_exchange_strong(holder, getpid())) continue;
        for (auto& bytes : each.bytes) bytes = 0;
        own = &each;
        return each;
    }
    log("more than %d processes", MOST_PROCESSES);
    abort();
}

size_t held(int device) {
    size_t sum = 0;
    for (int place = 0; place < MOST_PROCESSES; ++place) {
        const Holding& each = holdings()[place];
        if (each.process && !has_ended(each.process)) sum += each.bytes[device_number(device)];
    }
    return sum;
}

// The numbers of the visible devices.
const std::vector<int>& visible() {
    static const std::vector<int> devices = [] {
        const int all = std::min(atoi(setting("SPLITWISER_STAND_IN_DEVICES", "1").c_str()), MOST_DEVICES);
        std::vector<std::string> uuids;
        for (int number = 0; number < all; ++number) {
            char text[64];
            snprintf(text, sizeof text, "GPU-01020304-0506-0708-090a-0b0c0d0e0f%02x", 16 + number);
            uuids.push_back(text);
        }
        const char* named = std::getenv("CUDA_VISIBLE_DEVICES");
        std::vector<int> found;
        for (int number = 0; !named && number < all; ++number) found.push_back(number);
        for (const std::string& each : split(named ? named : "")) {
            const bool by_uuid = each.rfind("GPU-", 0) == 0;
            const int number = by_uuid ? std::find(uuids.begin(), uuids.end(), each) - uuids.begin() : atoi(each.c_str());
            if (number < 0 || number >= all) break;  // as CUDA does: what follows a wrong one is not seen
            found.push_back(number);
        }
        return found;
    }();
    return devices;
}

std::map<char*, Block>::iterator block_with(const void* pointer) {
    char* const at = static_cast<char*>(const_cast<void*>(pointer));
    auto found = blocks.upper_bound(at);
    if (found == blocks.begin()) return blocks.end();
    --found;
    return at < found->first + found->second.size ? found : blocks.end();
}

void* map_file(int file, size_t size) {
    void* mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    return mapped == MAP_FAILED ? nullptr : mapped;
}

}  // namespace

void log(const char* format, ...) {
    static FILE* const file = open_log();
    if (!file) return;
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    char name[32] = "";
    if (FILE* comm = fopen("/proc/self/comm", "r")) {
        if (fgets(name, sizeof name, comm)) name[strcspn(name, "\n")] = 0;
        fclose(comm);
    }
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    fprintf(file, "%.4f %d/%ld %s %s\n", now.tv_sec + now.tv_nsec * 1e-9, getpid(), thread_id(), name, text);
}

void delay(const char* function) {
    static const std::map<std::string, double> delays = [] {
        std::map<std::string, double> read;
        for (const std::string& each : split(setting("SPLITWISER_STAND_IN_DELAY", ""))) {
            const size_t equals = each.find('=');
            if (equals != std::string::npos) read[each.substr(0, equals)] = atof(each.c_str() + equals + 1);
        }
        return read;
    }();
    if (delays.empty()) return;
    const auto found = delays.find(function);
    if (found != delays.end()) usleep(static_cast<useconds_t>(found->second * 1e6));
}

bool is_refused(const char* function) {
    static const std::vector<std::string> refused = split(setting("SPLITWISER_STAND_IN_REFUSED", ""));
    return std::find(refused.begin(), refused.end(), function) != refused.end();
}

// ---- devices and contexts

void initialise() {
    if (initialised) return;
    initialised = true;
    log("cuInit CUDA_MPS_PIPE_DIRECTORY=%s CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=%s CUDA_MPS_CLIENT_PRIORITY=%s "
        "CUDA_VISIBLE_DEVICES=%s CUDA_DEVICE_MAX_CONNECTIONS=%s",
        setting("CUDA_MPS_PIPE_DIRECTORY", "").c_str(), setting("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "").c_str(),
        setting("CUDA_MPS_CLIENT_PRIORITY", "").c_str(), setting("CUDA_VISIBLE_DEVICES", "").c_str(),
        setting("CUDA_DEVICE_MAX_CONNECTIONS", "").c_str());
    delay("cuInit");
}

bool is_initialised() { return initialised; }

int device_count() { return static_cast<int>(visible().size()); }

int device_number(int device) { return visible()[device]; }

void device_uuid(int device, char* bytes) {
    for (int place = 0; place < 16; ++place) bytes[place] = static_cast<char>(place + 1);
    bytes[15] = static_cast<char>(16 + device_number(device));
}

void device_pci_bus(int device, char* text, int size) { snprintf(text, size, "0000:%02x:00.0", device_number(device) + 1); }

int current_device() { return thread_device; }

void set_current_device(int device) { thread_device = device; }

bool has_context(int device) { return contexts[device]; }

void make_context(int device) {
    initialise();
    Lock lock(mutex);
    if (process_of_contexts && process_of_contexts != getpid()) log("USED AFTER FORK");
    if (contexts[device]) return;
    contexts[device] = true;
    process_of_contexts = getpid();
    own_holding().bytes[device_number(device)] += CONTEXT_MEMORY;
    log("context on device %d", device);
    delay("context");
}

void enter(const char* function) {
    make_context(current_device());
    delay(function);
}

// ---- errors

cudaError_t fail(cudaError_t error, const char* why) {
    log("ERROR %d %s", error, why);
    thread_error = error;
    return error;
}

cudaError_t last_error(bool clear) {
    const cudaError_t error = thread_error;
    if (clear) thread_error = cudaSuccess;
    return error;
}

// ---- memory

cudaError_t allocate(void** pointer, size_t size, bool on_host) {
    Lock lock(mutex);
    *pointer = nullptr;
    size = (std::max<size_t>(size, 1) + PAGE - 1) / PAGE * PAGE;
    const int device = current_device();
    if (!on_host && size > free_memory(device)) return fail(cudaErrorMemoryAllocation, "out of memory");
    const int file = memfd_create("stand-in", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, size)) return fail(cudaErrorMemoryAllocation, "no file for memory");
    void* const mapped = map_file(file, size);
    if (!mapped) return fail(cudaErrorMemoryAllocation, "memory cannot be mapped");
    blocks[static_cast<char*>(mapped)] = {size, file, on_host, device, false};
    if (!on_host) own_holding().bytes[device_number(device)] += size;
    *pointer = mapped;
    return cudaSuccess;
}

cudaError_t release(void* pointer) {
    if (!pointer) return cudaSuccess;
    Lock lock(mutex);
    const auto found = blocks.find(static_cast<char*>(pointer));
    if (found == blocks.end()) return fail(cudaErrorInvalidValue, "what is freed was not allocated");
    const Block block = found->second;
    if (!block.on_host && !block.imported) own_holding().bytes[device_number(block.device)] -= block.size;
    munmap(pointer, block.size);
    close(block.file);
    blocks.erase(found);
    return cudaSuccess;
}

size_t free_memory(int device) {
    const size_t used = held(device);
    return used < TOTAL_MEMORY ? TOTAL_MEMORY - used : 0;
}

Place place_of(const void* pointer) {
    Lock lock(mutex);
    const auto found = block_with(pointer);
    if (found == blocks.end()) return {false, true, -1};
    return {true, found->second.on_host, found->second.on_host ? -1 : found->second.device};
}

cudaError_t export_memory(const void* pointer, cudaIpcMemHandle_t* handle) {
    Lock lock(mutex);
    const auto found = block_with(pointer);
    if (found == blocks.end() || found->first != pointer)
        return fail(cudaErrorInvalidValue, "an IPC handle is of the beginning of an allocation");
    const Block& block = found->second;
    const Handle written = {HANDLE_MARK, getpid(), block.file, device_number(block.device), block.size};
    static_assert(sizeof written <= sizeof *handle);
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &written, sizeof written);
    return cudaSuccess;
}

cudaError_t import_memory(const cudaIpcMemHandle_t& handle, void** pointer) {
    Handle read;
    memcpy(&read, &handle, sizeof read);
    if (read.mark != HANDLE_MARK || read.process == getpid())
        return fail(cudaErrorInvalidResourceHandle, "an IPC handle is opened by another process");
    log("memory of process %d: %zu MiB", read.process, read.size >> 20);
    const std::string path = "/proc/" + std::to_string(read.process) + "/fd/" + std::to_string(read.file);
    const int file = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (file < 0) return fail(cudaErrorInvalidResourceHandle, "the process that made the IPC handle has gone");
    void* const mapped = map_file(file, read.size);
    if (!mapped) return fail(cudaErrorMemoryAllocation, "memory cannot be mapped");
    Lock lock(mutex);
    const auto device = std::find(visible().begin(), visible().end(), read.device_number) - visible().begin();
    blocks[static_cast<char*>(mapped)] = {read.size, file, false, static_cast<int>(device), true};
    *pointer = mapped;
    return cudaSuccess;
}

// ---- streams and captures

Stream* new_stream(int device, unsigned flags, int priority, int green_context, int multiprocessors) {
    Stream* const stream = new Stream;
    stream->device = device;
    stream->flags = flags;
    stream->priority = priority;
    stream->green_context = green_context;
    stream->multiprocessors = multiprocessors;
    return stream;
}

Stream* stream_of(cudaStream_t handle) {
    const bool by_number = reinterpret_cast<uintptr_t>(handle) < 3;  // 0, cudaStreamLegacy, cudaStreamPerThread
    return by_number ? &default_streams[current_device()] : reinterpret_cast<Stream*>(handle);
}

bool is_default(const Stream* stream) { return stream >= default_streams && stream < default_streams + MOST_DEVICES; }

void spoil(Stream* stream, const char* call) {
    stream->status = cudaStreamCaptureStatusInvalidated;
    log("FORBIDDEN DURING CAPTURE: %s", call);
}

bool is_forbidden(const char* call) {
    if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
    Lock lock(mutex);
    bool forbidden = false;
    for (Stream* stream : capturing) {
        const bool by_own = stream->owner == thread_id() && stream->mode != cudaStreamCaptureModeRelaxed;
        const bool by_other = stream->owner != thread_id() && stream->mode == cudaStreamCaptureModeGlobal &&
                              thread_mode == cudaStreamCaptureModeGlobal;
        if (!by_own && !by_other) continue;
        spoil(stream, call);
        forbidden = true;
    }
    return forbidden;
}

cudaError_t launch(Stream* stream) {
    if (!is_default(stream) && stream->device != current_device())
        return fail(cudaErrorInvalidResourceHandle, "launch into a stream of another device than the current one");
    if (stream->status == cudaStreamCaptureStatusInvalidated)
        return fail(cudaErrorStreamCaptureInvalidated, "launch into a spoilt capture");
    if (stream->capturing()) ++stream->graph->kernels;
    return cudaSuccess;
}

cudaError_t begin_capture(Stream* stream, cudaStreamCaptureMode mode) {
    Lock lock(mutex);
    if (is_default(stream)) return fail(cudaErrorStreamCaptureUnsupported, "capture of the default stream");
    if (stream->capturing()) return fail(cudaErrorIllegalState, "the stream is capturing");
    stream->status = cudaStreamCaptureStatusActive;
    stream->mode = mode;
    stream->owner = thread_id();
    stream->capture = ++captures;
    stream->graph = new Graph;
    capturing.push_back(stream);
    return cudaSuccess;
}

cudaError_t end_capture(Stream* stream, Graph** graph) {
    Lock lock(mutex);
    *graph = nullptr;
    if (!stream->capturing()) return fail(cudaErrorIllegalState, "the stream is not capturing");
    const bool spoilt = stream->status == cudaStreamCaptureStatusInvalidated;
    capturing.erase(std::remove(capturing.begin(), capturing.end(), stream), capturing.end());
    stream->status = cudaStreamCaptureStatusNone;
    if (stream->owner != thread_id() && stream->mode != cudaStreamCaptureModeRelaxed)
        return fail(cudaErrorStreamCaptureWrongThread, "another thread began the capture");
    if (spoilt) {
        delete stream->graph;
        return fail(cudaErrorStreamCaptureInvalidated, "end of a spoilt capture");
    }
    *graph = stream->graph;
    log("captured %ld kernels and %zu copies for %d multiprocessors (green context %d)", stream->graph->kernels,
        stream->graph->copies.size(), stream->multiprocessors, stream->green_context);
    return cudaSuccess;
}

bool is_blocked_by_capture(const Stream* stream) {
    if (!is_default(stream)) return false;
    Lock lock(mutex);
    return std::any_of(capturing.begin(), capturing.end(),
                       [](const Stream* each) { return !(each->flags & cudaStreamNonBlocking); });
}

cudaStreamCaptureMode exchange_mode(cudaStreamCaptureMode mode) {
    std::swap(mode, thread_mode);
    return mode;
}

}  // namespace stand_in

// For the emulator, whose kernels are no launches of CUDA's: counts one where the stream is captured.
extern "C" int stand_in_launch(cudaStream_t stream) { return stand_in::launch(stand_in::stream_of(stream)); }

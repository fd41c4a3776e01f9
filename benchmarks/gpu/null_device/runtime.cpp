// libcudart of the null device: memory is the host's, copies copy, kernels are counted and not run.
//
// Every function that is not here is a stub that succeeds (build.py). What is put on a stream that is being captured is
// counted as an operation of the graph, and waiting for that stream or for the device is the error that CUDA makes of it.
#include <driver_types.h>
#include <vector_types.h>

#include <dlfcn.h>
#include <execinfo.h>
#include <sys/mman.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#define API(result) extern "C" __attribute__((visibility("default"))) result

// The order is that of COUNTS in counters.py.
enum Count { OPERATIONS, CAPTURED, GRAPH_LAUNCHES, SYNCHRONISATIONS, BLOCKING_COPIES, ALLOCATIONS, NUMBER_OF_COUNTS };
static std::atomic<uint64_t> counts[NUMBER_OF_COUNTS];
// The stream that is being captured, if there is one.
static std::atomic<cudaStream_t> capturing{nullptr};
static bool is_captured(cudaStream_t stream) { return stream && stream == capturing; }

// A kernel, a copy or a fill that was put on a stream. Other libraries count theirs without telling the stream.
static cudaError_t operation(cudaStream_t stream) {
  counts[is_captured(stream) ? CAPTURED : OPERATIONS]++;
  return cudaSuccess;
}
API(void) null_cuda_operation() { operation(capturing); }
API(void) null_cuda_counts(uint64_t* out) {
  for (int i = 0; i < NUMBER_OF_COUNTS; i++) out[i] = counts[i];
}

// Waiting is the error of a capture; NULL_CUDA_TRACE=1 prints who waits there.
static cudaError_t waiting(Count kind, bool forbidden) {
  counts[kind]++;
  if (forbidden && getenv("NULL_CUDA_TRACE")) {
    void* callers[40];
    backtrace_symbols_fd(callers, backtrace(callers, 40), 2);
  }
  return forbidden ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

// ---- memory: pages of the host, whose kind torch asks for by address
struct Block { size_t size; cudaMemoryType kind; };
static std::mutex lock;
static std::map<uintptr_t, Block> blocks;

static cudaError_t take(void** out, size_t size, cudaMemoryType kind) {
  size = (size + 4095) & ~size_t(4095);
  if (size == 0) size = 4096;
  void* found = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return cudaErrorMemoryAllocation;
  std::lock_guard<std::mutex> held(lock);
  blocks[(uintptr_t)found] = {size, kind};
  *out = found;
  counts[ALLOCATIONS]++;
  return cudaSuccess;
}

static cudaError_t give_back(void* address) {
  std::lock_guard<std::mutex> held(lock);
  auto found = blocks.find((uintptr_t)address);
  if (found != blocks.end()) {
    munmap(address, found->second.size);
    blocks.erase(found);
  }
  return cudaSuccess;
}

API(cudaError_t) cudaMalloc(void** out, size_t size) { return take(out, size, cudaMemoryTypeDevice); }
API(cudaError_t) cudaMallocAsync(void** out, size_t size, cudaStream_t) { return cudaMalloc(out, size); }
API(cudaError_t) cudaMallocManaged(void** out, size_t size, unsigned) { return cudaMalloc(out, size); }
API(cudaError_t) cudaHostAlloc(void** out, size_t size, unsigned) { return take(out, size, cudaMemoryTypeHost); }
API(cudaError_t) cudaMallocHost(void** out, size_t size) { return cudaHostAlloc(out, size, 0); }
API(cudaError_t) cudaFree(void* address) { return give_back(address); }
API(cudaError_t) cudaFreeAsync(void* address, cudaStream_t) { return give_back(address); }
API(cudaError_t) cudaFreeHost(void* address) { return give_back(address); }
API(cudaError_t) cudaGetSymbolAddress(void** out, const void*) { return cudaMalloc(out, 4096); }
API(cudaError_t) cudaMemGetInfo(size_t* available, size_t* total) {
  *available = 138ull << 30;
  *total = 139ull << 30;
  return cudaSuccess;
}
API(cudaError_t) cudaPointerGetAttributes(cudaPointerAttributes* out, const void* address) {
  memset(out, 0, sizeof *out);
  out->type = cudaMemoryTypeUnregistered;
  out->device = -2;
  std::lock_guard<std::mutex> held(lock);
  auto after = blocks.upper_bound((uintptr_t)address);
  if (after == blocks.begin()) return cudaSuccess;
  auto block = *--after;
  if ((uintptr_t)address >= block.first + block.second.size) return cudaSuccess;
  out->type = block.second.kind;
  out->device = 0;
  out->devicePointer = (void*)address;
  if (out->type == cudaMemoryTypeHost) out->hostPointer = (void*)address;
  return cudaSuccess;
}

API(cudaError_t) cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  memmove(to, from, size);
  return waiting(BLOCKING_COPIES, capturing);
}
API(cudaError_t) cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  memmove(to, from, size);
  return operation(stream);
}
API(cudaError_t) cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  memset(to, value, size);
  return operation(stream);
}
API(cudaError_t) cudaMemset(void* to, int value, size_t size) { return cudaMemsetAsync(to, value, size, nullptr); }

// ---- kernels
struct Call { dim3 grid, block; size_t shared; void* stream; };
static thread_local Call call;
API(unsigned) __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  call = {grid, block, shared, stream};
  return 0;
}
API(cudaError_t) __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = call.grid;
  *block = call.block;
  *shared = call.shared;
  *(void**)stream = call.stream;
  return cudaSuccess;
}
API(void**) __cudaRegisterFatBinary(void* wrapper) {
  void** handle = (void**)malloc(sizeof(void*));
  *handle = wrapper;
  return handle;
}
API(cudaError_t) __cudaGetKernel(void** kernel, const void* function) {
  *kernel = (void*)function;
  return cudaSuccess;
}
API(cudaError_t) __cudaLaunchKernel(void*, dim3, dim3, void**, size_t, cudaStream_t stream) { return operation(stream); }
API(cudaError_t) cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return operation(stream);
}
API(cudaError_t) cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void*, void**) {
  return operation(how->stream);
}
API(cudaError_t) cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return operation(stream);
}
API(cudaError_t) cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
  memset(out, 0, sizeof *out);
  out->maxThreadsPerBlock = 1024;
  out->numRegs = 32;
  out->ptxVersion = out->binaryVersion = 90;
  out->maxDynamicSharedSizeBytes = 232448;
  return cudaSuccess;
}
API(cudaError_t) cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* out, const void*, int, size_t) {
  *out = 2;
  return cudaSuccess;
}
API(cudaError_t) cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* out, const void*, int, size_t, unsigned) {
  *out = 2;
  return cudaSuccess;
}

// ---- streams, events, graphs
static std::atomic<uintptr_t> handles{0x1000};
template <typename Handle> static cudaError_t handle(Handle* out) {
  *out = (Handle)(handles += 0x100);
  return cudaSuccess;
}
API(cudaError_t) cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int) { return handle(out); }
API(cudaError_t) cudaStreamCreateWithFlags(cudaStream_t* out, unsigned) { return handle(out); }
API(cudaError_t) cudaStreamCreate(cudaStream_t* out) { return handle(out); }
API(cudaError_t) cudaStreamSynchronize(cudaStream_t stream) { return waiting(SYNCHRONISATIONS, is_captured(stream)); }
API(cudaError_t) cudaDeviceSynchronize() { return waiting(SYNCHRONISATIONS, capturing); }
API(cudaError_t) cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* out) {
  *out = is_captured(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
API(cudaError_t) cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  capturing = stream;
  return cudaSuccess;
}
API(cudaError_t) cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t, const void*, const void*, size_t, int) {
  capturing = stream;
  return cudaSuccess;
}
API(cudaError_t) cudaStreamEndCapture(cudaStream_t, cudaGraph_t* out) {
  capturing = nullptr;
  return handle(out);
}
API(cudaError_t) cudaStreamGetCaptureInfo(cudaStream_t stream, int* status, unsigned long long* id, cudaGraph_t* graph,
                                          const void** dependencies, const void** edges, size_t* number) {
  if (status) *status = is_captured(stream);
  if (id) *id = 7;
  if (graph) *graph = (cudaGraph_t)0x77;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (number) *number = 0;
  return cudaSuccess;
}
API(cudaError_t) cudaGraphGetNodes(cudaGraph_t, void*, size_t* number) {
  *number = counts[CAPTURED];
  return cudaSuccess;
}
API(cudaError_t) cudaGraphCreate(cudaGraph_t* out, unsigned) { return handle(out); }
API(cudaError_t) cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t, unsigned long long) { return handle(out); }
API(cudaError_t) cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t, unsigned long long) {
  return handle(out);
}
API(cudaError_t) cudaUserObjectCreate(void** out, void*, void*, unsigned, unsigned) { return handle(out); }
API(cudaError_t) cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
  counts[GRAPH_LAUNCHES]++;
  return cudaSuccess;
}

// An event has the time of the host at which it was recorded.
API(cudaError_t) cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
  *out = (cudaEvent_t) new double(0);
  return cudaSuccess;
}
API(cudaError_t) cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
API(cudaError_t) cudaEventDestroy(cudaEvent_t event) {
  delete (double*)event;
  return cudaSuccess;
}
API(cudaError_t) cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  *(double*)event = now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
  return cudaSuccess;
}
API(cudaError_t) cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
API(cudaError_t) cudaEventSynchronize(cudaEvent_t) { return waiting(SYNCHRONISATIONS, capturing); }
API(cudaError_t) cudaEventElapsedTime(float* out, cudaEvent_t begin, cudaEvent_t end) {
  *out = (float)(*(double*)end - *(double*)begin);
  return cudaSuccess;
}

// ---- what the device is: the sizes of an H200, under a name that nobody takes for one
API(cudaError_t) cudaGetDeviceCount(int* out) {
  *out = 1;
  return cudaSuccess;
}
API(cudaError_t) cudaGetDevice(int* out) {
  *out = 0;
  return cudaSuccess;
}
API(cudaError_t) cudaDriverGetVersion(int* out) {
  *out = NULL_CUDA_VERSION;
  return cudaSuccess;
}
API(cudaError_t) cudaRuntimeGetVersion(int* out) { return cudaDriverGetVersion(out); }
API(const char*) cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing" : "null device";
}
API(const char*) cudaGetErrorName(cudaError_t) { return "nullDevice"; }
API(int) null_cuda_attribute(int attribute) {
  static const std::map<int, int> known = {
      {cudaDevAttrMaxThreadsPerBlock, 1024}, {cudaDevAttrMaxBlockDimX, 1024}, {cudaDevAttrMaxBlockDimY, 1024},
      {cudaDevAttrMaxBlockDimZ, 64}, {cudaDevAttrMaxGridDimX, 2147483647}, {cudaDevAttrMaxGridDimY, 65535},
      {cudaDevAttrMaxGridDimZ, 65535}, {cudaDevAttrMaxSharedMemoryPerBlock, 49152}, {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxRegistersPerBlock, 65536}, {cudaDevAttrClockRate, 1980000},
      {cudaDevAttrMultiProcessorCount, 132}, {cudaDevAttrMemoryClockRate, 3201000},
      {cudaDevAttrGlobalMemoryBusWidth, 6144}, {cudaDevAttrL2CacheSize, 60 << 20},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048}, {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0}, {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
      {cudaDevAttrMaxRegistersPerMultiprocessor, 65536}, {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
      {cudaDevAttrMaxBlocksPerMultiprocessor, 32}};
  auto found = known.find(attribute);
  return found == known.end() ? 1 : found->second;
}
API(cudaError_t) cudaDeviceGetAttribute(int* out, int attribute, int) {
  *out = null_cuda_attribute(attribute);
  return cudaSuccess;
}
API(cudaError_t) cudaDeviceCanAccessPeer(int* out, int, int) {
  *out = 0;
  return cudaSuccess;
}
API(cudaError_t) cudaDeviceGetPCIBusId(char* out, int size, int) {
  snprintf(out, size, "0000:01:00.0");
  return cudaSuccess;
}
API(cudaError_t) cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
API(cudaError_t) cudaDeviceGetDefaultMemPool(void** out, int) { return handle(out); }
API(cudaError_t) cudaMemPoolGetAttribute(void*, int, void* out) {
  *(uint64_t*)out = 0;
  return cudaSuccess;
}
API(cudaError_t) cudaGetDeviceProperties(cudaDeviceProp* out, int) {
  memset(out, 0, sizeof *out);
  strcpy(out->name, "null device");
  for (int i = 0; i < 16; i++) out->uuid.bytes[i] = i;
  out->totalGlobalMem = 139ull << 30;
  out->major = 9;
  out->minor = 0;
  out->multiProcessorCount = 132;
  out->warpSize = 32;
  out->maxThreadsPerBlock = out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
  out->maxThreadsDim[2] = 64;
  out->maxGridSize[0] = 2147483647;
  out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->maxThreadsPerMultiProcessor = 2048;
  out->maxBlocksPerMultiProcessor = 32;
  out->sharedMemPerBlock = 49152;
  out->sharedMemPerBlockOptin = 232448;
  out->sharedMemPerMultiprocessor = 233472;
  out->regsPerBlock = out->regsPerMultiprocessor = 65536;
  out->l2CacheSize = 60 << 20;
  out->memoryBusWidth = 6144;
  out->unifiedAddressing = out->canMapHostMemory = out->concurrentKernels = out->streamPrioritiesSupported = 1;
  out->managedMemory = out->memoryPoolsSupported = out->cooperativeLaunch = out->clusterLaunch = 1;
  return cudaSuccess;
}

// Functions of the driver by name: torch and Triton ask the runtime for them.
API(cudaError_t) cudaGetDriverEntryPointByVersion(const char* name, void** out, unsigned, unsigned long long,
                                                  cudaDriverEntryPointQueryResult* found) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  char second[256];
  snprintf(second, sizeof second, "%s_v2", name);
  *out = driver ? dlsym(driver, name) : nullptr;
  if (driver && !*out) *out = dlsym(driver, second);
  if (found) *found = *out ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
API(cudaError_t) cudaGetDriverEntryPoint(const char* name, void** out, unsigned long long flags,
                                         cudaDriverEntryPointQueryResult* found) {
  return cudaGetDriverEntryPointByVersion(name, out, 0, flags, found);
}

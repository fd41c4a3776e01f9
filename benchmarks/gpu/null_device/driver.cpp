// libcuda of the null device: what torch and Triton ask the driver for, above libcudart of the null device.
#include <cstdint>
#include <cstdio>
#include <cstring>

#define API(result) extern "C" __attribute__((visibility("default"))) result
extern "C" void null_cuda_operation();
extern "C" int null_cuda_attribute(int);

template <typename Handle> static int handle(Handle* out) {
  *out = (Handle)0x42;
  return 0;
}
template <typename Number> static int number(Number* out, Number value) {
  *out = value;
  return 0;
}
API(int) cuDriverGetVersion(int* out) { return number(out, NULL_CUDA_VERSION); }
API(int) cuDeviceGetCount(int* out) { return number(out, 1); }
API(int) cuDeviceGet(int* out, int) { return number(out, 0); }
API(int) cuDeviceGetName(char* out, int size, int) {
  snprintf(out, size, "null device");
  return 0;
}
API(int) cuDeviceGetAttribute(int* out, int attribute, int) { return number(out, null_cuda_attribute(attribute)); }
API(int) cuDeviceTotalMem_v2(size_t* out, int) { return number(out, size_t(139) << 30); }
API(int) cuMemGetInfo_v2(size_t* available, size_t* total) {
  number(available, size_t(138) << 30);
  return number(total, size_t(139) << 30);
}
API(int) cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  number(flags, 0u);
  return number(active, 1);
}
API(int) cuDevicePrimaryCtxRetain(void** out, int) { return handle(out); }
API(int) cuCtxGetCurrent(void** out) { return handle(out); }
API(int) cuCtxGetDevice(int* out) { return number(out, 0); }
API(int) cuModuleLoad(void** out, const char*) { return handle(out); }
API(int) cuModuleLoadData(void** out, const void*) { return handle(out); }
API(int) cuModuleLoadDataEx(void** out, const void*, unsigned, void*, void*) { return handle(out); }
API(int) cuModuleGetFunction(void** out, void*, const char*) { return handle(out); }
API(int) cuLibraryLoadData(void** out, const void*, void*, void*, unsigned, void*, void*, unsigned) { return handle(out); }
API(int) cuLibraryGetKernel(void** out, void*, const char*) { return handle(out); }
API(int) cuKernelGetFunction(void** out, void*) { return handle(out); }
API(int) cuFuncGetModule(void** out, void*) { return handle(out); }
// 4 is the number of registers of a thread, 0 the largest block.
API(int) cuFuncGetAttribute(int* out, int attribute, void*) {
  return number(out, attribute == 4 ? 32 : attribute == 0 ? 1024 : 0);
}
API(int) cuOccupancyMaxActiveBlocksPerMultiprocessor(int* out, void*, int, size_t) { return number(out, 2); }
API(int) cuOccupancyMaxActiveClusters(int* out, void*, void*) { return number(out, 2); }
API(int) cuStreamIsCapturing(void*, int* out) { return number(out, 0); }
// 3 is the address on the device; otherwise the kind of memory.
API(int) cuPointerGetAttribute(void* out, int attribute, uint64_t address) {
  return attribute == 3 ? number((uint64_t*)out, address) : number((int*)out, 2);
}
API(int) cuGetErrorString(int, const char** out) { return number(out, "null device"); }
API(int) cuGetErrorName(int, const char** out) { return number(out, "nullDevice"); }
static int launched() {
  null_cuda_operation();
  return 0;
}
API(int) cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**) {
  return launched();
}
API(int) cuLaunchKernelEx(const void*, void*, void**, void**) { return launched(); }

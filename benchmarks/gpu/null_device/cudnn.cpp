// libcudnn of the null device: a convolution, a normalisation or a pooling is one operation.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define API(result) extern "C" __attribute__((visibility("default"))) result
extern "C" void null_cuda_operation();

static int object(void** out) {
  *out = calloc(1, 256);
  return 0;
}
API(int) cudnnCreate(void** out) { return object(out); }
API(int) cudnnCreateTensorDescriptor(void** out) { return object(out); }
API(int) cudnnCreateFilterDescriptor(void** out) { return object(out); }
API(int) cudnnCreateConvolutionDescriptor(void** out) { return object(out); }
API(int) cudnnCreateActivationDescriptor(void** out) { return object(out); }
API(int) cudnnCreatePoolingDescriptor(void** out) { return object(out); }
API(int) cudnnCreateDropoutDescriptor(void** out) { return object(out); }
API(size_t) cudnnGetVersion() { return 92600; }
API(size_t) cudnnGetCudartVersion() { return NULL_CUDA_VERSION; }
API(size_t) cudnnGetMaxDeviceVersion() { return 1200; }
API(const char*) cudnnGetErrorString(int) { return "null device"; }
API(void) cudnnGetLastErrorString(char* out, size_t size) {
  if (size) *out = 0;
}
// 0 is the first number of the version, 1 the second one.
API(int) cudnnGetProperty(int which, int* out) {
  *out = which == 0 ? 9 : which == 1 ? 26 : 0;
  return 0;
}
API(int) cudnnBackendCreateDescriptor(int, void** out) { return object(out); }
// An engine has one configuration, without notes and workspace; 15 is the type of descriptors, which are not written.
API(int) cudnnBackendGetAttribute(void*, int name, int type, int64_t wanted, int64_t* found, void* out) {
  int64_t there = name >= 1302 && name <= 1304 ? 0 : 1;
  int64_t written = wanted == 0 || there < wanted ? there : wanted;
  if (found) *found = written;
  if (out && wanted > 0 && type != 15 && written > 0) memset(out, 0, 8 * written);
  return 0;
}
#define OPERATION(name)       \
  API(int) name(...) {        \
    null_cuda_operation();    \
    return 0;                 \
  }
OPERATION(cudnnBackendExecute)
OPERATION(cudnnBatchNormalizationForwardTrainingEx)
OPERATION(cudnnBatchNormalizationBackwardEx)
OPERATION(cudnnBatchNormalizationForwardInference)
OPERATION(cudnnPoolingForward)
OPERATION(cudnnPoolingBackward)
API(int) cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*,
                                                                  size_t* out) {
  *out = 0;
  return 0;
}
API(int) cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*, void*,
                                                           void*, size_t* out) {
  *out = 0;
  return 0;
}
API(int) cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*, size_t* out) {
  *out = 16;
  return 0;
}

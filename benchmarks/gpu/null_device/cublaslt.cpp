// libcublasLt of the null device: a product is one operation, and there is one algorithm for it.
#include <cstdlib>
#include <cstring>

#define API(result) extern "C" __attribute__((visibility("default"))) result
extern "C" void null_cuda_operation();

static int object(void** out) {
  *out = calloc(1, 64);
  return 0;
}
API(int) cublasLtCreate(void** out) { return object(out); }
API(int) cublasLtMatmulDescCreate(void** out, ...) { return object(out); }
API(int) cublasLtMatmulPreferenceCreate(void** out) { return object(out); }
API(int) cublasLtMatrixLayoutCreate(void** out, ...) { return object(out); }
API(size_t) cublasLtGetVersion() { return 130400; }
API(int) cublasLtMatmul(...) {
  null_cuda_operation();
  return 0;
}
// A result is 96 bytes; zeros are an algorithm that needs no workspace and that works.
API(int) cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* out, int* found) {
  memset(out, 0, 96);
  *found = 1;
  return 0;
}

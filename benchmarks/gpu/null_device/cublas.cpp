// libcublas of the null device: a product is one operation.
#include <cstdlib>

#define API(result) extern "C" __attribute__((visibility("default"))) result
extern "C" void null_cuda_operation();

API(int) cublasCreate_v2(void** out) {
  *out = calloc(1, 64);
  return 0;
}
API(int) cublasGetMathMode(void*, int* out) { return *out = 0; }
API(int) cublasGetPointerMode_v2(void*, int* out) { return *out = 0; }
API(int) cublasGetVersion_v2(void*, int* out) {
  *out = 130400;
  return 0;
}
#define PRODUCT(name)         \
  API(int) name(...) {        \
    null_cuda_operation();    \
    return 0;                 \
  }
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDotEx)

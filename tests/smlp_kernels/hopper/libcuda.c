/* The CUDA driver as Triton's calls it, for two devices that are not there.

   A handle says what it belongs to: context 10 + device, module 100 + context, function
   1000 + context. What is handed over is kept for the test to read. */
#include <cuda.h>
#include <string.h>

char failing[64]; /* a function's name */
int local_bytes;

int loads, launches, largest_shared;
char kernel[64];
unsigned dims[7]; /* grid, block, bytes of shared memory */
size_t function, stream;
unsigned char parameters[256]; /* 8 bytes each */
int count;                     /* of parameters */

size_t current; /* context */

#define START if (!strcmp(__func__, failing)) return CUDA_ERROR_UNKNOWN
#define IGNORED(NAME, ...) CUresult NAME(__VA_ARGS__) { START; return CUDA_SUCCESS; }

CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = code == CUDA_ERROR_UNKNOWN ? failing : "a misuse";
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { START; *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448 : 233472;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  START;
  *context = (CUcontext)(size_t)(10 + device);
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)current; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { current = (size_t)context; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = current - 10; return CUDA_SUCCESS; }
IGNORED(cuCtxGetLimit, size_t *value, CUlimit limit)
IGNORED(cuCtxSetLimit, CUlimit limit, size_t value)
IGNORED(cuModuleUnload, CUmodule module)
IGNORED(cuStreamIsCapturing, CUstream stream, CUstreamCaptureStatus *status)
IGNORED(cuFuncSetCacheConfig, CUfunction of, CUfunc_cache config)

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  START;
  loads++;
  *module = (CUmodule)(100 + current);
  return memcmp(image, "\177ELF", 4) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *found, CUmodule module, const char *name) {
  START;
  strncpy(kernel, name, sizeof kernel - 1);
  *found = (CUfunction)(1000 + current);
  return (size_t)module == 100 + current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction of) {
  START;
  *value = attribute == CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES ? local_bytes : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction of, CUfunction_attribute attribute, int value) {
  START;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  largest_shared = value;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}
/* Reads as many parameters as `count` says, the first nine of 8 bytes, the others of 4. */
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction of, void **arguments, void **extra) {
  START;
  unsigned all[7] = {config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
                     config->blockDimY, config->blockDimZ, config->sharedMemBytes};
  memcpy(dims, all, sizeof dims);
  unsigned char *to = parameters;
  for (int i = 0; i < count; to += i++ < 9 ? 8 : 4) memcpy(to, arguments[i], i < 9 ? 8 : 4);
  function = (size_t)of, stream = (size_t)config->hStream, launches++;
  return function == 1000 + current && !config->numAttrs && !extra ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

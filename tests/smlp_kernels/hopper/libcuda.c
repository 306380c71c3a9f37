/* The CUDA driver's functions that the loader calls, for two devices that are not there.

   A handle says what it belongs to: context 10 + device, module 100 + context, function
   1000 + context. What the loader hands over is kept for the test to read. */
#include <string.h>

enum { INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400 };

char failing[64]; /* a function's name */
int failing_with;
int local_bytes;

char images[16][8]; /* the first bytes of what was loaded */
int loads, launches;
char kernel[64];
long current[8]; /* stack of contexts */
int depth;
long function;
unsigned dims[6], shared_bytes;
int largest_shared;
unsigned long long stream;
unsigned char parameters[144];

#define START if (!strcmp(__func__, failing)) return failing_with
#define IN_CONTEXT if (!depth) return INVALID_CONTEXT

int cuDeviceGet(int *device, int ordinal) {
  START;
  *device = ordinal;
  return ordinal < 2 ? 0 : INVALID_VALUE;
}

int cuDevicePrimaryCtxRetain(long *context, int device) {
  START;
  *context = 10 + device;
  return 0;
}

int cuCtxPushCurrent_v2(long context) {
  START;
  current[++depth] = context;
  return 0;
}

int cuCtxPopCurrent_v2(long *context) {
  IN_CONTEXT;
  *context = current[depth--];
  return 0;
}

int cuModuleLoadData(long *module, const char *image) {
  START;
  IN_CONTEXT;
  memcpy(images[loads++ % 16], image, 8);
  *module = 100 + current[depth];
  return memcmp(image, "\177ELF", 4) && memcmp(image, ".version", 8) ? INVALID_IMAGE : 0;
}

int cuModuleGetFunction(long *found, long module, const char *name) {
  START;
  IN_CONTEXT;
  strncpy(kernel, name, sizeof kernel - 1);
  *found = 1000 + current[depth];
  return module == 100 + current[depth] ? 0 : INVALID_HANDLE;
}

int cuFuncGetAttribute(int *value, int attribute, long of) {
  START;
  *value = local_bytes;
  return attribute == 3 && of == 1000 + current[depth] ? 0 : INVALID_VALUE;
}

int cuFuncSetAttribute(long of, int attribute, int value) {
  START;
  largest_shared = value;
  return attribute == 8 && of == 1000 + current[depth] ? 0 : INVALID_VALUE;
}

int cuLaunchKernel(long of, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, unsigned long long on,
                   void **arguments, void **extra) {
  START;
  IN_CONTEXT;
  unsigned all[6] = {grid_x, grid_y, grid_z, block_x, block_y, block_z};
  memcpy(dims, all, sizeof all);
  memcpy(parameters, arguments[0], sizeof parameters);
  function = of, shared_bytes = shared, stream = on, launches++;
  return of == 1000 + current[depth] && !extra ? 0 : INVALID_HANDLE;
}

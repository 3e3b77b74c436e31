/* A CUDA driver that does nothing: what Triton's launcher and torch's Python ask of one, so that
   all host code of a launch runs on a machine without a GPU. No kernel is run. */
#include <stddef.h>
#include <stdint.h>

typedef int Result; /* 0: success */

static long launches, maps;

long null_launches(void) { return launches; }
long null_tensor_maps(void) { return maps; }

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { return *version = 12080, 0; }
Result cuGetErrorString(Result code, const char **words) { return *words = "none", 0; }
Result cuCtxGetCurrent(void **context) { return *context = (void *)1, 0; }
Result cuCtxGetDevice(int *device) { return *device = 0, 0; }
Result cuCtxSetCurrent(void *context) { return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { return *value = 1 << 20, 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuDeviceGet(int *device, int index) { return *device = index, 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, 0; }

/* of each attribute the same, which is the shared memory of an H100, and enough of all else */
Result cuDeviceGetAttribute(int *value, int attribute, int device) { return *value = 232448, 0; }

/* 0: threads of a block; 1 and 3: static shared memory and memory for spills; 4: registers */
Result cuFuncGetAttribute(int *value, int attribute, void *function) {
  return *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0, 0;
}
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuModuleLoadData(void **module, const void *image) { return *module = (void *)1, 0; }
Result cuModuleUnload(void *module) { return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) {
  return *function = (void *)1, 0;
}
Result cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) {
  return *count = 1, 0;
}
Result cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
  return *(uint64_t *)data = pointer, 0;
}
Result cuStreamIsCapturing(void *stream, int *status) { return *status = 0, 0; }
Result cuTensorMapEncodeTiled(void *map, ...) { return maps++, 0; }
Result cuLaunchKernelEx(const void *config, void *function, void **arguments, void **extra) {
  return launches++, 0;
}

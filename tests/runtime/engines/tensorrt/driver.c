/* A CUDA driver for machines without one: "device" memory is the host's, streams do at once what
 * they are given. Tests of edgeexit's buffers run against it through the real cuda-bindings; what a
 * GPU computes cannot be tested with it.
 *
 *     cc -shared -fPIC -o libcuda.so.1 driver.c
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int status;
typedef unsigned long long address;
enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NOT_FOUND = 500, NOT_READY = 600 };
static size_t left = 64u << 20; /* bytes of "device" memory */
static int pending;             /* an event was recorded and not asked for yet */

static status init(unsigned flags) { (void)flags; return OK; }
static status version(int *out) { *out = 13000; return OK; }
static status get(int *device, int number) { *device = 0; return number ? INVALID : OK; }
static status name(char *out, int size, int device) {
  (void)device;
  strncpy(out, "Host pretending to be a GPU", (size_t)size);
  return OK;
}
static status attribute(int *out, int which, int device) {
  const char *shares = getenv("FAKE_INTEGRATED");
  (void)device;
  *out = which == 18 ? shares != NULL : which == 75 ? 8 : which == 76 ? 6 : which == 16 ? 4 : 0;
  return OK;
}
static status retain(void **context, int device) { (void)device; *context = &left; return OK; }
static status release(int device) { (void)device; return OK; }
static status current(void *context) { return context ? OK : INVALID; }
static status stream(void **out, unsigned flags) { (void)flags; *out = &pending; return OK; }
static status nothing(void *any) { (void)any; return OK; }
static status event(void **out, unsigned flags) { (void)flags; *out = &pending; return OK; }
static status record(void *e, void *s) { (void)e; (void)s; pending = 2; return OK; }
static status query(void *e) { (void)e; return pending-- > 0 ? NOT_READY : OK; }
static status information(size_t *free_, size_t *total) { *free_ = left; *total = 64u << 20; return OK; }
static status allocate(address *out, size_t size) {
  size_t *held;
  if (size > left) return NO_MEMORY;
  held = malloc(size + 64);
  if (!held) return NO_MEMORY;
  memset(held, 0xA5, size + 64); /* nobody may count on zeros */
  *held = size;
  left -= size;
  *out = (address)(uintptr_t)held + 64;
  return OK;
}
static status release_memory(address pointer) {
  size_t *held = (size_t *)(uintptr_t)(pointer - 64);
  left += *held;
  free(held);
  return OK;
}
static status allocate_host(void **out, size_t size, unsigned flags) {
  (void)flags;
  *out = malloc(size);
  return *out ? OK : NO_MEMORY;
}
static status release_host(void *pointer) { free(pointer); return OK; }
static status mapped(address *out, void *pointer, unsigned flags) {
  (void)flags;
  *out = (address)(uintptr_t)pointer;
  return OK;
}
static status to_device(address to, const void *from, size_t size, void *s) {
  (void)s;
  memcpy((void *)(uintptr_t)to, from, size);
  return OK;
}
static status to_host(void *to, address from, size_t size, void *s) {
  (void)s;
  memcpy(to, (void *)(uintptr_t)from, size);
  return OK;
}
static status within(address to, address from, size_t size, void *s) {
  (void)s;
  if (to < from + size && from < to + size) return INVALID; /* they overlap: undefined on a GPU */
  memcpy((void *)(uintptr_t)to, (void *)(uintptr_t)from, size);
  return OK;
}
static status error_name(status code, const char **out) {
  (void)code;
  *out = "CUDA_ERROR";
  return OK;
}

struct entry { const char *name; void *function; };
#define ENTRY(name, function) {name, (void *)(uintptr_t)function}
static const struct entry ENTRIES[] = {
    ENTRY("cuInit", init), ENTRY("cuDriverGetVersion", version), ENTRY("cuDeviceGet", get),
    ENTRY("cuDeviceGetName", name), ENTRY("cuDeviceGetAttribute", attribute),
    ENTRY("cuDevicePrimaryCtxRetain", retain), ENTRY("cuDevicePrimaryCtxRelease", release),
    ENTRY("cuCtxSetCurrent", current), ENTRY("cuStreamCreate", stream),
    ENTRY("cuStreamDestroy", nothing), ENTRY("cuStreamSynchronize", nothing),
    ENTRY("cuEventCreate", event), ENTRY("cuEventDestroy", nothing),
    ENTRY("cuEventRecord", record), ENTRY("cuEventQuery", query),
    ENTRY("cuEventSynchronize", nothing), ENTRY("cuMemGetInfo", information),
    ENTRY("cuMemAlloc", allocate), ENTRY("cuMemFree", release_memory),
    ENTRY("cuMemHostAlloc", allocate_host), ENTRY("cuMemFreeHost", release_host),
    ENTRY("cuMemHostGetDevicePointer", mapped), ENTRY("cuMemcpyHtoDAsync", to_device),
    ENTRY("cuMemcpyDtoHAsync", to_host), ENTRY("cuMemcpyDtoDAsync", within),
    ENTRY("cuGetErrorName", error_name), ENTRY("cuGetErrorString", error_name),
};

status cuGetProcAddress_v2(const char *symbol, void **out, int wanted, uint64_t flags, int *found);
status cuGetProcAddress_v2(const char *symbol, void **out, int wanted, uint64_t flags, int *found) {
  (void)wanted;
  (void)flags;
  *out = NULL;
  if (!strcmp(symbol, "cuGetProcAddress")) *out = (void *)(uintptr_t)cuGetProcAddress_v2;
  for (size_t i = 0; i < sizeof ENTRIES / sizeof *ENTRIES; i++)
    if (!strcmp(symbol, ENTRIES[i].name)) *out = ENTRIES[i].function;
  if (found) *found = *out ? 0 : 1;
  return *out ? OK : NOT_FOUND;
}
status cuGetProcAddress(const char *symbol, void **out, int wanted, uint64_t flags);
status cuGetProcAddress(const char *symbol, void **out, int wanted, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, out, wanted, flags, NULL);
}

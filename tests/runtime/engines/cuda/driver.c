/* A CUDA driver for machines without one: "device" memory is the host's. Streams do nothing until
 * somebody waits for them, so who reads too early reads what was there before, and who overwrites
 * what a run has still to read spoils it; with FAKE_EAGER they do at once what they are given, so
 * who gives them too much too early finds his answers overwritten. Tests of edgeexit's buffers run against it through the real cuda-bindings; what a
 * GPU computes cannot be tested with it. "Device" memory can be touched by the driver alone: any
 * other read or write ends the process, as it would on a GPU. Who computes in a GPU's place opens
 * it meanwhile (device_memory).
 *
 *     cc -shared -fPIC -o libcuda.so.1 driver.c
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef int status;
typedef unsigned long long address;
enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NO_CONTEXT = 201, NOT_FOUND = 500, NOT_READY = 600 };
static size_t left = 64u << 20; /* bytes of "device" memory */
struct stream;
struct event { double ms; int pending; struct stream *waits; }; /* pending: answers "not ready" so often */

enum { PAGE = 4096, PIECES = 4096 };
static const size_t ROOM = (size_t)1 << 32; /* of addresses: pieces are seldom used again */
static char *room;
static size_t end;
static struct { size_t start, size; int used; } pieces[PIECES];
static int opened, count;

void device_memory(int open_);
void device_memory(int open_) {
  opened += open_ ? 1 : -1;
  if (room && opened == (open_ ? 1 : 0))
    mprotect(room, end, opened ? PROT_READ | PROT_WRITE : PROT_NONE);
}

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
static __thread void *now; /* the context of this thread */
static status current(void *context) { now = context; return context ? OK : INVALID; }
static __thread void *before[8];
static __thread int depth;
static status push(void *context) {
  if (depth == 8) return INVALID;
  before[depth++] = now;
  now = context;
  return OK;
}
static status pop(void **context) {
  if (!depth) return INVALID;
  *context = now;
  now = before[--depth];
  return OK;
}
static status information(size_t *free_, size_t *total) { *free_ = left; *total = 64u << 20; return OK; }
static status allocate(address *out, size_t size) {
  size_t whole = (size + PAGE - 1) / PAGE * PAGE;
  int n = 0;
  if (!now) return NO_CONTEXT;
  if (size > left) return NO_MEMORY;
  if (!room) {
    room = mmap(NULL, ROOM, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) return NO_MEMORY;
  }
  while (n < count && (pieces[n].used || (pieces[n].size + PAGE - 1) / PAGE * PAGE != whole)) n++;
  if (n == count) {
    if (count == PIECES || end + whole + PAGE > ROOM) return NO_MEMORY;
    pieces[count++].start = end;
    end += whole + PAGE; /* and a page that nobody writes */
  }
  pieces[n].size = size;
  pieces[n].used = 1;
  left -= size;
  *out = (address)(uintptr_t)(room + pieces[n].start);
  device_memory(1);
  memset(room + pieces[n].start, 0xA5, size); /* nobody may count on zeros */
  device_memory(0);
  return OK;
}
static status release_memory(address pointer) {
  if (!now) return NO_CONTEXT;
  for (int n = 0; n < count; n++)
    if (pieces[n].used && (address)(uintptr_t)(room + pieces[n].start) == pointer) {
      left += pieces[n].size;
      pieces[n].used = 0;
      return OK;
    }
  return INVALID;
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
/* What a stream is given while it is recorded, and graphs of it. */
struct side { size_t x, y, z, lod; int type; void *host; address device; void *array, *reserved; size_t pitch, height; };
struct copy { struct side from, to; size_t width, height, depth; };
typedef void (*host_function)(void *);
enum kind { TO_DEVICE, TO_HOST, WITHIN, FILL, COPY, CALL, RECORD };
struct step { enum kind kind; void *to; const void *from; size_t size; unsigned char value; struct copy block; host_function call; };
struct graph { int steps; struct step step[64]; };
struct stream { size_t first, last, room; struct step *steps; struct graph *recorded; };

static int given_back(const void *pointer) { /* memory that nobody holds any longer */
  size_t at = (size_t)((const char *)pointer - room);
  if (!room || (const char *)pointer < room || at >= end) return 0;
  for (int n = 0; n < count; n++)
    if (pieces[n].used && at >= pieces[n].start && at < pieces[n].start + pieces[n].size) return 0;
  return 1;
}
static status perform(const struct step *s) {
  if (s->kind == CALL) {
    s->call(s->to);
    return OK;
  }
  if (s->kind == RECORD) {
    struct event *e = s->to;
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    e->ms = 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
    e->waits = NULL;
    return OK;
  }
  if (s->kind == COPY ? given_back((void *)(uintptr_t)s->block.to.device) || given_back((void *)(uintptr_t)s->block.from.device)
                      : given_back(s->to) || given_back(s->from))
    return INVALID;
  device_memory(1);
  if (s->kind == FILL) memset(s->to, s->value, s->size);
  else if (s->kind == COPY)
    for (size_t z = 0; z < s->block.depth; z++)
      for (size_t y = 0; y < s->block.height; y++)
        memcpy((char *)(uintptr_t)s->block.to.device + (z * s->block.to.height + y) * s->block.to.pitch,
               (char *)(uintptr_t)s->block.from.device + (z * s->block.from.height + y) * s->block.from.pitch,
               s->block.width);
  else memcpy(s->to, s->from, s->size);
  device_memory(0);
  return OK;
}
/* Does what a stream was given, until an event is reached (NULL: all of it). */
static status advance(struct stream *s, const struct event *until) {
  while (s->first < s->last && (!until || until->waits == s)) {
    struct step step = s->steps[s->first++]; /* the stream may be given more meanwhile */
    status found = perform(&step);
    if (found != OK) return found;
  }
  return OK;
}
static status give(struct stream *s, struct step step) {
  if (s->first == s->last) s->first = s->last = 0;
  if (s->last == s->room) {
    struct step *more = realloc(s->steps, (s->room = 2 * s->room + 64) * sizeof *more);
    if (!more) return NO_MEMORY;
    s->steps = more;
  }
  s->steps[s->last++] = step;
  return getenv("FAKE_EAGER") ? advance(s, NULL) : OK;
}
static status put(struct stream *s, struct step step) {
  if (!now) return NO_CONTEXT;
  if (!s->recorded) return give(s, step);
  if (step.kind == RECORD || s->recorded->steps == 64) return INVALID;
  s->recorded->step[s->recorded->steps++] = step;
  return OK;
}
static status stream(struct stream **out, unsigned flags) {
  (void)flags;
  *out = calloc(1, sizeof **out);
  return *out ? OK : NO_MEMORY;
}
static status wait_for_stream(struct stream *s) { return advance(s, NULL); }
static status drop(struct stream *s) {
  status found = advance(s, NULL);
  free(s->steps);
  free(s);
  return found;
}
static status event(struct event **out, unsigned flags) {
  (void)flags;
  *out = calloc(1, sizeof **out);
  return *out ? OK : NO_MEMORY;
}
static status wait_for(struct event *e) { return e->waits ? advance(e->waits, e) : OK; }
static status forget(struct event *e) {
  status found = wait_for(e);
  free(e);
  return found;
}
static status record(struct event *e, struct stream *s) {
  status found = wait_for(e); /* recorded again before it was reached: kept simple */
  if (found != OK) return found;
  e->waits = s;
  e->pending = 2;
  return put(s, (struct step){.kind = RECORD, .to = e});
}
static status query(struct event *e) { return e->pending-- > 0 ? NOT_READY : wait_for(e); }
static status elapsed(float *out, const struct event *from, const struct event *to) {
  if (from->waits || to->waits) return NOT_READY;
  *out = (float)(to->ms - from->ms);
  return OK;
}
static status begin(struct stream *s, int mode) {
  (void)mode;
  if (s->recorded) return INVALID;
  s->recorded = calloc(1, sizeof *s->recorded);
  return s->recorded ? OK : NO_MEMORY;
}
static status finish(struct stream *s, struct graph **out) {
  *out = s->recorded;
  s->recorded = NULL;
  return *out ? OK : INVALID;
}
static status instantiate(struct graph **out, const struct graph *graph, unsigned long long flags) {
  (void)flags;
  *out = malloc(sizeof **out);
  if (!*out) return NO_MEMORY;
  **out = *graph;
  return OK;
}
static status launch(const struct graph *graph, struct stream *s) {
  for (int n = 0; n < graph->steps; n++) {
    status found = give(s, graph->step[n]);
    if (found != OK) return found;
  }
  return OK;
}
static status destroy(struct graph *graph) { free(graph); return OK; }
static status call(struct stream *s, host_function function, void *data) {
  return put(s, (struct step){.kind = CALL, .call = function, .to = data});
}
static status to_device(address to, const void *from, size_t size, struct stream *s) {
  return put(s, (struct step){.kind = TO_DEVICE, .to = (void *)(uintptr_t)to, .from = from, .size = size});
}
static status to_host(void *to, address from, size_t size, struct stream *s) {
  return put(s, (struct step){.kind = TO_HOST, .to = to, .from = (void *)(uintptr_t)from, .size = size});
}
static status within(address to, address from, size_t size, struct stream *s) {
  if (to < from + size && from < to + size) return INVALID; /* they overlap: undefined on a GPU */
  return put(s, (struct step){.kind = WITHIN, .to = (void *)(uintptr_t)to, .from = (void *)(uintptr_t)from, .size = size});
}
static status fill(address to, unsigned char value, size_t size, struct stream *s) {
  return put(s, (struct step){.kind = FILL, .to = (void *)(uintptr_t)to, .value = value, .size = size});
}
static status copy(const struct copy *c, struct stream *s) {
  const struct side *from = &c->from, *to = &c->to;
  if (from->type != 2 || to->type != 2 || from->x || from->y || from->z || to->x || to->y || to->z) return INVALID;
  if (c->width > from->pitch || c->width > to->pitch || c->height > from->height || c->height > to->height) return INVALID;
  return put(s, (struct step){.kind = COPY, .block = *c});
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
    ENTRY("cuCtxSetCurrent", current), ENTRY("cuCtxPushCurrent", push), ENTRY("cuCtxPopCurrent", pop), ENTRY("cuStreamCreate", stream),
    ENTRY("cuStreamDestroy", drop), ENTRY("cuStreamSynchronize", wait_for_stream),
    ENTRY("cuEventCreate", event), ENTRY("cuEventDestroy", forget),
    ENTRY("cuEventElapsedTime", elapsed),
    ENTRY("cuEventRecord", record), ENTRY("cuEventQuery", query),
    ENTRY("cuEventSynchronize", wait_for), ENTRY("cuMemGetInfo", information),
    ENTRY("cuMemAlloc", allocate), ENTRY("cuMemFree", release_memory),
    ENTRY("cuMemHostAlloc", allocate_host), ENTRY("cuMemFreeHost", release_host),
    ENTRY("cuMemHostGetDevicePointer", mapped), ENTRY("cuMemcpyHtoDAsync", to_device),
    ENTRY("cuMemcpyDtoHAsync", to_host), ENTRY("cuMemcpyDtoDAsync", within),
    ENTRY("cuStreamBeginCapture", begin), ENTRY("cuStreamEndCapture", finish),
    ENTRY("cuGraphInstantiateWithFlags", instantiate), ENTRY("cuGraphLaunch", launch),
    ENTRY("cuGraphDestroy", destroy), ENTRY("cuGraphExecDestroy", destroy),
    ENTRY("cuLaunchHostFunc", call), ENTRY("cuMemsetD8Async", fill), ENTRY("cuMemcpy3DAsync", copy),
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

/* Runs one kernel of TVM's under an emulator: its object file is linked to this, statically.

   job: int32 arguments; for each int32 dimensions, type code, bits, int64 shape, then its bytes.
   out: the bytes of the last argument. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct { int32_t type, pad; union { int64_t i; void *p; } v; } Any;
typedef struct {
  void *data;
  struct { int32_t type, id; } device;
  int32_t ndim;
  struct { uint8_t code, bits; uint16_t lanes; } dtype;
  int64_t *shape, *strides;
  uint64_t offset;
} Tensor;
typedef struct { void *handle; int32_t tasks; } Group;
typedef int (*Task)(int, Group *, void *);

static void *aligned(size_t bytes) {
  return aligned_alloc(64, (bytes + 127) / 64 * 64);
}
static int launch(Task task, void *data, int count) {
  Group group = {0, 1};
  (void)count;
  return task(0, &group, data);
}
static int barrier(int task, Group *group) { return (void)task, (void)group, 0; }
static void *allocate(int type, int id, uint64_t bytes, int code, int bits) {
  return (void)type, (void)id, (void)code, (void)bits, aligned(bytes);
}
static int release(int type, int id, void *p) { return (void)type, (void)id, free(p), 0; }

/* The object has weak ones, empty, for a runtime to fill; these come first. */
__attribute__((weak)) int (*__TVMBackendParallelLaunch)(Task, void *, int) = launch;
__attribute__((weak)) int (*__TVMBackendParallelBarrier)(int, Group *) = barrier;
__attribute__((weak)) void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
__attribute__((weak)) int (*__TVMBackendFreeWorkspace)(int, int, void *) = release;

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  for (fputs(kind, stderr); count--; ++parts) fputs(*parts, stderr);
}
int __tvm_ffi_f(void *, Any *, int32_t, Any *);

static void take(FILE *f, void *to, size_t bytes) {
  if (fread(to, 1, bytes, f) != bytes) exit(2);
}

int main(int argc, char **argv) {
  int32_t count = 0, head[3];
  size_t bytes = 0;
  Tensor *t = 0;
  FILE *f = argc > 2 ? fopen(argv[1], "rb") : 0;
  if (!f) return 2;
  take(f, &count, sizeof count);
  Any *args = calloc(count, sizeof *args), result = {0, 0, {0}};
  for (int32_t i = 0; i < count; ++i) {
    take(f, head, sizeof head);
    t = calloc(1, sizeof *t);
    t->device.type = 1, t->ndim = head[0];
    t->dtype.code = head[1], t->dtype.bits = head[2], t->dtype.lanes = 1;
    t->shape = calloc(head[0], sizeof *t->shape);
    take(f, t->shape, head[0] * sizeof *t->shape);
    bytes = head[2] / 8;
    for (int32_t d = 0; d < head[0]; ++d) bytes *= t->shape[d];
    take(f, t->data = aligned(bytes), bytes);
    args[i].type = 7, args[i].v.p = t;
  }
  fclose(f);
  if (__tvm_ffi_f(0, args, count, &result)) return 1;
  f = fopen(argv[2], "wb");
  return !f || fwrite(t->data, 1, bytes, f) != bytes || fclose(f);
}

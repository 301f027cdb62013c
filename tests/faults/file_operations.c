/* Preloaded: counts the file operations below a place, and ends one of them as a machine would.
 *
 * Counted are calls that change what is on a disk. The n-th one kills the process, fails once with
 * EIO, or is the first of a full disk: from there on whatever needs room fails with ENOSPC.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

enum { COUNT, KILL, FAIL, FULL };

static char place[1024];
static int way;
static long at, count;

void faults_arm(const char *path, int how, long number) {
  snprintf(place, sizeof place, "%s", path);
  way = how, at = number, count = 0;
}

long faults_count(void) { return count; }

/* Whether the operation that comes now fails; errno is set then. */
static int strikes(const char *path, int needs_room) {
  if (!place[0] || !strstr(path, place)) return 0;
  ++count;
  if (way == KILL && count == at) kill(getpid(), SIGKILL);
  if (way == FAIL && count == at) return errno = EIO, 1;
  if (way == FULL && count >= at && needs_room) return errno = ENOSPC, 1;
  return 0;
}

static int strikes_file(int file, int needs_room) {
  char link[64], path[1024];
  if (!place[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return strikes(path, needs_room);
}

static int strikes_at(int folder, const char *path, int needs_room) {
  return path[0] == '/' || folder == AT_FDCWD ? strikes(path, needs_room)
                                              : strikes_file(folder, needs_room);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))

#define OPEN(name)                                                        \
  int name(const char *path, int flags, ...) {                            \
    va_list rest;                                                         \
    va_start(rest, flags);                                                \
    mode_t mode = va_arg(rest, mode_t);                                   \
    va_end(rest);                                                         \
    if (WRITES(flags) && strikes(path, flags & O_CREAT)) return -1;       \
    return NEXT(name)(path, flags, mode);                                 \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                            \
  int name(int folder, const char *path, int flags, ...) {                      \
    va_list rest;                                                               \
    va_start(rest, flags);                                                      \
    mode_t mode = va_arg(rest, mode_t);                                         \
    va_end(rest);                                                               \
    if (WRITES(flags) && strikes_at(folder, path, flags & O_CREAT)) return -1;  \
    return NEXT(name)(folder, path, flags, mode);                               \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *data, size_t size) {
  return strikes_file(file, 1) ? -1 : NEXT(write)(file, data, size);
}

ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
  return strikes_file(to, 1) ? -1 : NEXT(sendfile)(to, from, offset, size);
}

ssize_t sendfile64(int to, int from, off64_t *offset, size_t size) {
  return strikes_file(to, 1) ? -1 : NEXT(sendfile64)(to, from, offset, size);
}

int fsync(int file) { return strikes_file(file, 0) ? -1 : NEXT(fsync)(file); }

#define ON_PATH(name, needs_room, arguments, ...)            \
  int name arguments {                                       \
    return strikes(path, needs_room) ? -1 : NEXT(name)(__VA_ARGS__); \
  }
ON_PATH(mkdir, 1, (const char *path, mode_t mode), path, mode)
ON_PATH(rmdir, 0, (const char *path), path)
ON_PATH(unlink, 0, (const char *path), path)
ON_PATH(rename, 0, (const char *path, const char *to), path, to)

int unlinkat(int folder, const char *path, int flags) {
  return strikes_at(folder, path, 0) ? -1 : NEXT(unlinkat)(folder, path, flags);
}

int symlink(const char *target, const char *path) {
  return strikes(path, 1) ? -1 : NEXT(symlink)(target, path);
}

int renameat2(int from, const char *path, int into, const char *to, unsigned flags) {
  return strikes_at(from, path, 0) ? -1 : NEXT(renameat2)(from, path, into, to, flags);
}

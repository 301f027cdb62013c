// CUDA text on the CPU: the threads of a team of blocks are fibers that take turns at every wait.
//
// Shared memory of the blocks lies side by side; warps, blocks and the cluster have a barrier each,
// and what crosses lanes goes through a place of the warp. Instructions that text writes in PTX are
// defined here under the names that they have there, so that the text leaves its own out.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __noinline__
using std::max;
using std::min;
struct int2 { int x, y; };
struct uint2 { unsigned x, y; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

struct Barrier {
  int count = 0, arrived = 0, generation = 0;
  void wait();
};
struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool begun = false, done = false;
};
struct Warp {
  Barrier barrier;
  uint64_t slots[32];
};

constexpr size_t STACK = 48 << 10, SHARED = 256 << 10;
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static std::vector<Barrier> blocks;
static Barrier cluster;
static std::vector<char> stacks, shared_memory;
static std::function<void(int)> work;
static int current, block_threads;
static jmp_buf over;

static void switch_to_next() {
  const int count = (int)fibers.size();
  for (int step = 1; step <= count; ++step) {
    const int next = (current + step) % count;
    if (fibers[next].done) continue;
    current = next;
    if (fibers[next].begun) longjmp(fibers[next].place, 1);
    fibers[next].begun = true;
    setcontext(&fibers[next].start);
  }
  longjmp(over, 1);
}
static void yield() {
  if (!_setjmp(fibers[current].place)) switch_to_next();
}
inline void Barrier::wait() {
  const int mine = generation;
  if (++arrived == count) {
    arrived = 0;
    ++generation;
  } else {
    while (generation == mine) yield();
  }
}
static void begin() {
  work(current);
  fibers[current].done = true;
  switch_to_next();
}
// Run work(thread) on blocks * threads fibers; a block's shared memory is shared_of(its rank).
static void run_team(int count, int threads, std::function<void(int)> each) {
  block_threads = threads;
  work = each;
  const int all = count * threads;
  fibers.assign(all, Fiber());
  warps.assign(all / 32, Warp());
  blocks.assign(count, Barrier());
  for (auto& warp : warps) warp.barrier.count = 32;
  for (auto& block : blocks) block.count = threads;
  cluster = Barrier();
  cluster.count = all;
  stacks.resize(all * STACK);
  shared_memory.assign(count * SHARED, (char)0xa5);
  for (int i = 0; i < all; ++i) {
    getcontext(&fibers[i].start);
    fibers[i].start.uc_stack.ss_sp = &stacks[i * STACK];
    fibers[i].start.uc_stack.ss_size = STACK;
    fibers[i].start.uc_link = nullptr;
    makecontext(&fibers[i].start, begin, 0);
  }
  current = all - 1;
  if (!_setjmp(over)) switch_to_next();
}
static float* shared_of(int rank) { return (float*)&shared_memory[rank * SHARED]; }

#define AMX_CLUSTER_SYNC
#define AMX_CLUSTER_ARRIVE
#define AMX_CLUSTER_WAIT
#define AMX_LAUNCH_DEPENDENTS
#define AMX_WAIT_PREREQUISITES
#define AMX_PEER_OF
#define AMX_EXP2
#define AMX_EXP2_FLUSHED
inline void amx_cluster_sync() { cluster.wait(); }
inline void amx_cluster_arrive() {}
inline void amx_cluster_wait() { cluster.wait(); }
inline void amx_launch_dependents() {}
inline void amx_wait_prerequisites() {}
template <class T>
T* amx_peer_of(T* p, int rank) {
  return (T*)&shared_memory[rank * SHARED + ((char*)p - shared_memory.data()) % SHARED];
}
inline float amx_exp2(float v) { return std::exp2(v); }
inline float amx_exp2_flushed(float v) { return std::exp2(v); }

inline void __syncthreads() { blocks[current / block_threads].wait(); }
template <class T, class Read>
auto cross_lanes(T v, Read read) {
  Warp& warp = warps[current / 32];
  memcpy(&warp.slots[current % 32], &v, sizeof(T));
  warp.barrier.wait();
  const auto result = read([&](int lane) {
    T other;
    memcpy(&other, &warp.slots[lane], sizeof(T));
    return other;
  });
  warp.barrier.wait();
  return result;
}
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask, int = 32) {
  const int lane = current % 32;
  return cross_lanes(v, [=](auto of) { return of(lane ^ mask); });
}
template <class T>
T __shfl_sync(unsigned, T v, int from) {
  return cross_lanes(v, [=](auto of) { return of(from & 31); });
}
template <class T>
T __shfl_up_sync(unsigned, T v, int step) {
  const int lane = current % 32;
  return cross_lanes(v, [=](auto of) { return of(lane >= step ? lane - step : lane); });
}
inline unsigned __ballot_sync(unsigned, bool set) {
  return cross_lanes((int)set, [](auto of) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= (unsigned)of(lane) << lane;
    return bits;
  });
}
inline unsigned __reduce_max_sync(unsigned, unsigned v) {
  return cross_lanes(v, [](auto of) {
    unsigned found = 0;
    for (int lane = 0; lane < 32; ++lane) found = of(lane) > found ? of(lane) : found;
    return found;
  });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) { return ~__reduce_max_sync(mask, ~v); }
template <class T>
T atomicAdd(T* p, T v) { const T old = *p; *p += v; return old; }
inline int atomicOr(int* p, int v) { const int old = *p; *p |= v; return old; }

template <class To, class From>
To bits_of(From v) { To to; memcpy(&to, &v, sizeof(To)); return to; }
inline unsigned __float_as_uint(float v) { return bits_of<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return bits_of<float>(v); }
inline float __int_as_float(int v) { return bits_of<float>(v); }
inline double __longlong_as_double(long long v) { return bits_of<double>(v); }
inline long long __double_as_longlong(double v) { return bits_of<long long>(v); }
inline int __ffs(unsigned v) { return __builtin_ffs((int)v); }
inline int __clz(unsigned v) { return v ? __builtin_clz(v) : 32; }
inline int __float2int_rn(float v) { return (int)lrintf(v); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }

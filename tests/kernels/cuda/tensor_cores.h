// What generated kernels use beside fibers.h, on the CPU: halves, tensor cores, copies, thread numbers.
//
// A kernel's functions stand in guards of their names; those defined here leave out the PTX.
#define __global__
#define __host__
#define __launch_bounds__(...)
#define uint unsigned
#define uchar unsigned char
#define __expf expf
typedef _Float16 half;
typedef half __half;
struct __half2 { half x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Place { int x, y, z; };
static Place blockIdx;
static bool flat;  // a block's threads have one dimension
inline Place thread_place() { return flat ? Place{current, 0, 0} : Place{current % 32, current / 32, 0}; }
#define threadIdx thread_place()

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float __half2float(half v) { return v; }
inline half __float2half_rn(float v) { return v; }
inline __half2 __floats2half2_rn(float a, float b) { return {(half)a, (half)b}; }
inline float2 __half22float2(__half2 v) { return {(float)v.x, (float)v.y}; }
inline __half2 __high2half2(__half2 v) { return {v.y, v.y}; }
inline __half2 __low2half2(__half2 v) { return {v.x, v.x}; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline void __syncwarp() { warps[current / 32].barrier.wait(); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}

#define __align__(n) alignas(n)
#define CUDART_INF_F INFINITY
typedef __half2 half2;
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <class Do>
__half2 both_halves(Do each) { return {(half)each(0), (half)each(1)}; }
inline float half_of(__half2 v, int i) { return i ? v.y : v.x; }
inline __half2 __hmul2(__half2 a, __half2 b) { return both_halves([=](int i) { return half_of(a, i) * half_of(b, i); }); }
inline __half2 __hsub2(__half2 a, __half2 b) { return both_halves([=](int i) { return half_of(a, i) - half_of(b, i); }); }
inline __half2 __hneg2(__half2 a) { return both_halves([=](int i) { return -half_of(a, i); }); }
inline __half2 __habs2(__half2 a) { return both_halves([=](int i) { return fabsf(half_of(a, i)); }); }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return both_halves([=](int i) { return half_of(a, i) * half_of(b, i) + half_of(c, i); });
}
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcg(T* p, T v) { *p = v; }
inline void __threadfence() {}
inline float rsqrtf(float v) { return 1.f / sqrtf(v); }
inline void __sincosf(float x, float* s, float* c) { *s = sinf(x); *c = cosf(x); }
inline int __reduce_add_sync(unsigned, int v) {
  return cross_lanes(v, [](auto of) { int sum = 0; for (int i = 0; i < 32; ++i) sum += of(i); return sum; });
}
inline int __reduce_max_sync(unsigned, int v) {
  return cross_lanes(v, [](auto of) { int best = of(0); for (int i = 1; i < 32; ++i) best = max(best, of(i)); return best; });
}

#define AMX_SMEM
#define AMX_COPY16_CA
#define AMX_COPY16_CG
#define AMX_PREFETCH
#define AMX_COPY_COMMIT
#define AMX_COPY_WAIT
#define AMX_MATRIX4
#define AMX_MATRIX_TURNED4
#define AMX_MMA
#define AMX_MMA_UPPER
#define AMX_TURN_MATRIX
#define AMX_MMA_FIRST
#define AMX_LDG_WORDS1
#define AMX_LDG_WORDS2
#define AMX_LDG_WORDS4
#define AMX_LEAVE
inline unsigned amx_smem(const void* p) { return (unsigned)((char*)p - shared_memory.data()); }
inline void amx_copy16_ca(unsigned to, const void* from, bool inside) {
  if (inside) memcpy(&shared_memory[to], from, 16);
  else memset(&shared_memory[to], 0, 16);
}
inline void amx_copy16_cg(unsigned to, const void* from, bool inside) { amx_copy16_ca(to, from, inside); }
inline void amx_prefetch(const void*) {}
inline void amx_copy_commit() {}
template <int N> void amx_copy_wait() {}
inline void amx_ldg_words1(unsigned* d, const void* a) { memcpy(d, a, 4); }
inline void amx_ldg_words2(unsigned* d, const void* a) { memcpy(d, a, 8); }
inline void amx_ldg_words4(unsigned* d, const void* a) { memcpy(d, a, 16); }
inline void amx_leave(bool done) {
  if (!done) return;
  fibers[current].done = true;
  switch_to_next();
}
// Lane (g, t) gets the halves 2t, 2t + 1 of row g of every matrix; lane i has the address of row
// i % 8 of matrix i / 8.
inline void amx_matrix4(unsigned* d, unsigned a) {
  const int lane = current % 32;
  for (int i = 0; i < 4; ++i) {
    const unsigned row = cross_lanes(a, [=](auto of) { return of(8 * i + lane / 4); });
    memcpy(d + i, &shared_memory[row + 4 * (lane % 4)], 4);
  }
}
// It gets the halves of column g of rows 2t, 2t + 1.
inline void amx_matrix_turned4(unsigned* d, unsigned a) {
  const int lane = current % 32;
  for (int i = 0; i < 4; ++i)
    for (int e = 0; e < 2; ++e) {
      const unsigned row = cross_lanes(a, [=](auto of) { return of(8 * i + 2 * (lane % 4) + e); });
      memcpy((char*)(d + i) + 2 * e, &shared_memory[row + 2 * (lane / 4)], 2);
    }
}
// c [16][8] += a [16][16] b [16][8] in the registers of mma.m16n8k16.
inline void amx_mma(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  static unsigned given[64][32][6];
  const int warp = current / 32, lane = current % 32, g = lane / 4, t = lane % 4;
  const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  memcpy(given[warp][lane], mine, sizeof(mine));
  __syncwarp();
  const auto part = [&](int lane, int word, int half_of) {
    half both[2];
    memcpy(both, &given[warp][lane][word], 4);
    return (float)both[half_of];
  };
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2, low = i / 2;
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2, high = k / 8;
      c[i] += part(4 * g + from, 2 * high + low, k % 2) * part(4 * column + from, 4 + high, k % 2);
    }
  }
  __syncwarp();
}
inline unsigned amx_turn_matrix(unsigned v) {
  const int lane = current % 32, g = lane / 4, t = lane % 4;
  unsigned out = 0;
  for (int e = 0; e < 2; ++e) {
    const unsigned from = cross_lanes(v, [=](auto of) { return of(4 * (2 * t + e) + g / 2); });
    out |= (from >> 16 * (g % 2) & 0xffffu) << 16 * e;
  }
  return out;
}
inline void amx_mma_first(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  c[0] = c[1] = c[2] = c[3] = 0.f;
  amx_mma(c, a, b0, b1);
}
inline void amx_mma_upper(float* c, unsigned a0, unsigned a2, unsigned b0, unsigned b1) {
  const unsigned a[4] = {a0, 0u, a2, 0u};
  float sums[4] = {c[0], c[1], 0.f, 0.f};
  amx_mma(sums, a, b0, b1);
  c[0] = sums[0];
  c[1] = sums[1];
}

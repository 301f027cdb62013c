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
inline Place thread_place() { return {current % 32, current / 32, 0}; }
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

#define AMX_SMEM
#define AMX_COPY16_CA
#define AMX_COPY_COMMIT
#define AMX_COPY_WAIT
#define AMX_MATRIX4
#define AMX_MMA
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
inline void amx_mma_first(float* c, const unsigned* a, unsigned b0, unsigned b1) {
  c[0] = c[1] = c[2] = c[3] = 0.f;
  amx_mma(c, a, b0, b1);
}

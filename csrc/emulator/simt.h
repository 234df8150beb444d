// What a kernel sees when g++ compiles it instead of nvcc: CUDA's keywords, built-in variables and warp operations, each backed by
// the runtime in simt.cpp. A CUDA thread is a fiber (with its own stack, switched manually); the fibers of a block take turns in an
// order that follows from SIMT_SEED, so that a missing barrier shows as a wrong number, a NaN, or a report of ThreadSanitizer.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "opt_ds/qualifiers.h"
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };

namespace simt {

struct Context {  // of one CUDA thread
  dim3 thread, block, block_size, grid_size;
  unsigned lane;
  void* shared_memory;
};
extern Context* current;

// ---- barriers and warp operations. `shuffle` and the tensor-core operations make lanes meet but order no memory, as on a GPU.
void sync_threads();
[[noreturn]] void trap();
void sync_warp(unsigned mask);
uint64_t shuffle(unsigned mask, uint64_t value, int source_lane);

// mma.sync.m8n8k4, fp16 inputs, fp32 accumulator: what one lane puts in (2 registers of A and of B) and gets (8 of C, updated).
void mma_m8n8k4(const unsigned* a, const unsigned* b, float* c, bool row_major_b);
// mma.sync.m16n8k{8,16}: A 2 or 4 registers, B 1 or 2, C 4 floats.
void mma_m16n8(const unsigned* a, const unsigned* b, float* c, int k, bool bfloat16);
// ldmatrix.x4: the address of row (lane % 8) of matrix (lane / 8); one register of each of the four matrices.
void ldmatrix_x4(unsigned* registers, const void* row, bool transposed);

void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument);

template <class Function>
void run(dim3 grid, dim3 block, size_t shared_bytes, Function&& function) {
  launch(grid, block, shared_bytes, [](void* f) { (*static_cast<std::remove_reference_t<Function>*>(f))(); }, (void*)&function);
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace simt

#define threadIdx (simt::current->thread)
#define blockIdx (simt::current->block)
#define blockDim (simt::current->block_size)
#define gridDim (simt::current->grid_size)
#define __syncthreads() simt::sync_threads()
#define __trap() simt::trap()

inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::sync_warp(mask); }
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return simt::from_bits<T>(simt::shuffle(mask, simt::to_bits(value), source & 31));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flipped) {
  return __shfl_sync(mask, value, (int)simt::current->lane ^ flipped);
}

// ---- arithmetic
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((uint64_t)a * b) >> 32); }
inline float __int_as_float(int x) { return simt::from_bits<float>((unsigned)x); }

typedef _Float16 half;
inline half __float2half_rn(float x) { return (half)x; }
inline float __half2float(half x) { return (float)x; }

struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) { return simt::from_bits<float>((uint32_t)x.bits << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {  // to nearest, ties to even
  uint32_t bits = (uint32_t)simt::to_bits(x);
  if (std::isnan(x)) return {0x7fff};
  return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// The one place where a kernel file learns who compiles it: nvcc or NVRTC (a real kernel) or g++ (the CPU emulator).
// Also the element types, and how eight of them travel between memory and fp32 registers.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define OPT_DS_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#ifndef __CUDACC_RTC__  // NVRTC compiles kernels alone, without the code that launches them
#include <cuda_runtime.h>
#define OPT_DS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), (cudaStream_t)(stream)>>>(__VA_ARGS__)
#endif
#else
#include "simt.h"
#define OPT_DS_SHARED_MEMORY(name) unsigned char* name = (unsigned char*)simt::current->shared_memory
#define OPT_DS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  simt::run((grid), (block), (shared_bytes), [=] { kernel(__VA_ARGS__); })
#endif

#ifndef OPT_DS_EMULATED_ARCH
#define OPT_DS_EMULATED_ARCH 70
#endif

namespace opt_ds {

using bfloat16 = __nv_bfloat16;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T> struct IsBFloat16 { static constexpr bool value = false; };
template <> struct IsBFloat16<bfloat16> { static constexpr bool value = true; };

// ---- one element
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ half from_float<half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16_rn(x); }

// ---- two 16-bit elements in a register, the first in the low half
template <class T> __device__ __forceinline__ unsigned pack(float low, float high);
#ifdef __CUDACC__
template <> __device__ __forceinline__ unsigned pack<half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
template <> __device__ __forceinline__ unsigned pack<bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}
template <class T> __device__ __forceinline__ float unpack_low(unsigned x);
template <> __device__ __forceinline__ float unpack_low<half>(unsigned x) { return __half2float(__ushort_as_half((unsigned short)x)); }
template <> __device__ __forceinline__ float unpack_low<bfloat16>(unsigned x) { return __uint_as_float(x << 16); }
template <class T> __device__ __forceinline__ float unpack_high(unsigned x) { return unpack_low<T>(x >> 16); }
template <> __device__ __forceinline__ float unpack_high<bfloat16>(unsigned x) { return __uint_as_float(x & 0xffff0000u); }
#else
template <class T> unsigned pack(float low, float high) {
  return (unsigned)simt::to_bits(from_float<T>(low)) | (unsigned)simt::to_bits(from_float<T>(high)) << 16;
}
template <class T> float unpack_low(unsigned x) { return to_float(simt::from_bits<T>(x & 0xffff)); }
template <class T> float unpack_high(unsigned x) { return to_float(simt::from_bits<T>(x >> 16)); }
#endif

// ---- eight neighbouring elements: 16-byte accesses, so `p` must be aligned to 16 bytes
template <class T>
__device__ __forceinline__ void load8(const T* p, float (&x)[8]) {
  const uint4 bits = *reinterpret_cast<const uint4*>(p);
  const unsigned pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = unpack_low<T>(pairs[i]);
    x[2 * i + 1] = unpack_high<T>(pairs[i]);
  }
}
template <>
__device__ __forceinline__ void load8<float>(const float* p, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(p + i);
    x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
  }
}
template <class T>
__device__ __forceinline__ void store8(T* p, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(p) = uint4{pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
}
template <>
__device__ __forceinline__ void store8<float>(float* p, const float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) *reinterpret_cast<float4*>(p + i) = float4{x[i], x[i + 1], x[i + 2], x[i + 3]};
}

// ---- numbers
__device__ __forceinline__ float negative_infinity() { return __int_as_float((int)0xff800000); }  // NVRTC has no INFINITY
constexpr float kLog2E = 1.4426950408889634f;

// 2^x to about 2 ulp: one instruction of the special-function unit.
__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// The same value, of which the compiler knows nothing: what is computed from it inside a loop stays there, instead of occupying
// registers all through the loop.
__device__ __forceinline__ unsigned opaque(unsigned x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// ---- sums over a warp: a butterfly, so that every lane ends with the same bits
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

}  // namespace opt_ds

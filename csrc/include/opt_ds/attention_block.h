// The shape of a block's work, the products that forward and backward share, and the launch by head size and type.
//
// A block owns some rows of one head of one sequence (forward and dq: queries; dk and dv: keys): 16 * kRowTiles of them for each of
// its four warps. It streams tiles of 32 rows of the other side through shared memory. A warp's 32 x 32 (or 16 x 32) corner of the
// score matrix lives in registers only: scores[row tile][column group][8], in the accumulator layout of the architecture's Mma.
#pragma once
#include "opt_ds/launch.h"
#include "opt_ds/mma.h"

namespace opt_ds {

// Head size 128 halves a warp's rows: its accumulators are twice as wide, and registers are what limits all of these kernels.
template <int kHeadSize>
struct BlockShape {
  static constexpr int kRowTiles = kHeadSize <= 64 ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kBlockRows = kWarpRows * kAttentionWarps;
};

// The number of this warp in its block. The shuffle tells the compiler that all lanes agree on it; without it, branches on it count
// as divergent, and every shuffle inside them becomes a function call.
__device__ __forceinline__ int warp_number() { return __shfl_sync(kAllLanes, (int)threadIdx.x / kWarp, 0); }

template <int kRows, int kColumns>
__device__ __forceinline__ void set_zero(float (&x)[kRows][kColumns][8]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int i = 0; i < 8; ++i) x[r][c][i] = 0.f;
}

// scores[mt][j] += rows[mt] * columns[j]^T for one step of the inner dimension. Neighbouring instructions use different
// accumulators, so that none waits for the one before.
template <class M, int kRowTiles, int kGroups>
__device__ __forceinline__ void multiply(float (&scores)[kRowTiles][kGroups][8], const uint4 (&rows)[kRowTiles],
                                         const uint4 (&columns)[kGroups]) {
#pragma unroll
  for (int part = 0; part < 2; ++part)
#pragma unroll
    for (int j = 0; j < kGroups; ++j)
#pragma unroll
      for (int mt = 0; mt < kRowTiles; ++mt) M::multiply_part(scores[mt][j], rows[mt], columns[j], part);
}

#ifndef __CUDACC_RTC__
template <int kHeadSize> struct HeadSize { static constexpr int value = kHeadSize; };

inline bool tensor_cores_take(const OptDsAttention& a) {
  const bool type = a.type == kOptDsFloat16 || (a.type == kOptDsBFloat16 && compiled_architecture() >= 80);
  const bool size = a.head_size == 32 || a.head_size == 64 || a.head_size == 128;
  const bool strides = a.q_stride % 8 == 0 && a.k_stride % 8 == 0 && a.v_stride % 8 == 0;
  return type && size && strides && aligned16(a.q) && aligned16(a.k) && aligned16(a.v);
}

// Calls f(element, head size) for what tensor cores take.
template <class Function>
int with_mma_kernel(const OptDsAttention& a, Function&& f) {
  auto by_size = [&](auto element) {
    if (a.head_size == 32) return f(element, HeadSize<32>());
    if (a.head_size == 64) return f(element, HeadSize<64>());
    return f(element, HeadSize<128>());
  };
  return a.type == kOptDsFloat16 ? by_size(half()) : by_size(bfloat16());
}

inline AttentionShape shape_of(const OptDsAttention& a) {
  return {a.cu_queries, a.cu_keys, a.sample_index, a.num_heads, a.total_queries, a.causal != 0, a.scale};
}

// The kernels for everything else (attention_plain.cu).
int plain_attention_forward(const OptDsAttention& a, void* stream);
int plain_attention_backward(const OptDsAttentionBackward& a, void* stream);
#endif

}  // namespace opt_ds

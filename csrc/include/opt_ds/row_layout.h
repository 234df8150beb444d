// How threads share a row of `width` elements, for the kernels that work on whole rows (LayerNorm).
//
// Narrow rows (up to 1024) belong to one warp each, four rows to a block: no barrier is needed. Wide rows (up to 8192) belong to a
// block of 256 threads. A thread holds kChunks groups of 8 neighbouring columns in registers: one 16-byte access per tensor and
// group, neighbouring threads at neighbouring addresses. Everything is read once and written once.
#pragma once
#include "opt_ds/device.h"
#include "opt_ds/dropout.h"
#include "opt_ds/launch.h"

namespace opt_ds {

constexpr int kNarrowWidth = 1024, kWideWidth = 8192;

template <int kThreadsPerRow, int kChunks_>
struct RowLayout {
  static constexpr int kChunks = kChunks_;
  static constexpr int kRowsPerBlock = kThreadsPerRow == kWarp ? 4 : 1;
  static constexpr int kBlockThreads = kThreadsPerRow * kRowsPerBlock;
  static constexpr int kWarpsPerRow = kThreadsPerRow / kWarp;

  static __device__ __forceinline__ int row_in_block() { return threadIdx.x / kThreadsPerRow; }
  static __device__ __forceinline__ int column(int chunk) { return (chunk * kThreadsPerRow + threadIdx.x % kThreadsPerRow) * 8; }

  // Sums of a and b over the row's threads. `scratch` holds 2 * kWarpsPerRow floats, and must not be written again before the next
  // barrier after this call: callers alternate between two.
  static __device__ __forceinline__ void sum(float& a, float& b, float* scratch) {
    a = warp_sum(a);
    b = warp_sum(b);
    if (kWarpsPerRow == 1) return;
    const int warp = threadIdx.x / kWarp;
    if (threadIdx.x % kWarp == 0) {
      scratch[2 * warp] = a;
      scratch[2 * warp + 1] = b;
    }
    __syncthreads();  // BARRIER row_sum
    a = b = 0.f;
#pragma unroll
    for (int w = 0; w < kWarpsPerRow; ++w) {
      a += scratch[2 * w];
      b += scratch[2 * w + 1];
    }
  }
};

// Calls f(RowLayout<...>()) with the smallest layout that holds `width`, which is at most kWideWidth.
template <class Function>
void with_row_layout(int width, Function&& f) {
  const int per_chunk = width <= kNarrowWidth ? kWarp * 8 : 256 * 8;
  const int chunks = (width + per_chunk - 1) / per_chunk;
  if (width <= kNarrowWidth) {
    if (chunks == 1) return f(RowLayout<kWarp, 1>());
    if (chunks == 2) return f(RowLayout<kWarp, 2>());
    if (chunks == 3) return f(RowLayout<kWarp, 3>());
    return f(RowLayout<kWarp, 4>());
  }
  if (chunks == 1) return f(RowLayout<256, 1>());
  if (chunks == 2) return f(RowLayout<256, 2>());
  if (chunks == 3) return f(RowLayout<256, 3>());
  return f(RowLayout<256, 4>());
}

// Which of 8 columns starting at `column` are kept: the low 8 bits.
__device__ __forceinline__ unsigned keep8(const Dropout& dropout, const int* row_key, int column) {
  return keep_word(dropout, column / 32, row_key[1], row_key[0], 0) >> (column % 32);
}

}  // namespace opt_ds

// What the attention kernels of every architecture share: the tile in shared memory, its loading, and the trading of dropout bits.
#pragma once
#include "opt_ds/device.h"
#include "opt_ds/dropout.h"

namespace opt_ds {

constexpr int kAttentionWarps = 4, kAttentionThreads = kAttentionWarps * kWarp;
constexpr int kTileRows = 32;  // rows of a streamed tile

// A tile holds rows of kHeadSize 16-bit elements. A 16-byte access is served eight lanes at a time, without conflict when the eight
// 16-byte chunks lie in different groups of four banks. The kernels read one chunk of eight neighbouring rows, or neighbouring chunks
// of four rows; storing chunk c of row r at c ^ (r % 8) makes all of these fall in different groups.
template <int kHeadSize>
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  if (kHeadSize == 32) return row * kHeadSize + 8 * (chunk ^ (row >> 1 & 3));  // two rows span the 32 banks
  return row * kHeadSize + 8 * (chunk ^ (row & 7));
}

// kRows rows on their way from global memory to a tile: in registers, so that the loads run while the warp computes.
template <class T, int kHeadSize, int kRows>
struct TileInFlight {
  static constexpr int kChunks = kHeadSize / 8, kPerThread = kRows * kChunks / kAttentionThreads;
  uint4 chunk[kPerThread];

  // Rows at or past `num_rows` read as 0.
  __device__ __forceinline__ void load(const T* rows, long long stride, int first, int num_rows) {
#pragma unroll
    for (int n = 0; n < kPerThread; ++n) {
      const int index = threadIdx.x + n * kAttentionThreads, row = first + index / kChunks;
      chunk[n] = uint4{0, 0, 0, 0};
      if (row < num_rows) chunk[n] = *reinterpret_cast<const uint4*>(rows + row * stride + 8 * (index % kChunks));  // MUTATE tail
    }
  }
  __device__ __forceinline__ void store(T* tile) const {
#pragma unroll
    for (int n = 0; n < kPerThread; ++n) {
      const int index = threadIdx.x + n * kAttentionThreads;
      *reinterpret_cast<uint4*>(tile + tile_offset<kHeadSize>(index / kChunks, index % kChunks)) = chunk[n];
    }
  }
};

template <class T, int kHeadSize, int kRows>
__device__ __forceinline__ void copy_tile(T* tile, const T* rows, long long stride, int first, int num_rows) {
  TileInFlight<T, kHeadSize, kRows> in_flight;
  in_flight.load(rows, stride, first, num_rows);
  in_flight.store(tile);
}

// A 32 x 32 bit matrix, a word a lane: swaps the role of a lane number's bit and a bit number's bit. In a few of these, "a word a
// query" becomes "a word of the elements that this lane's accumulator holds".
template <int kLaneBit, int kBitBit>
__device__ __forceinline__ unsigned trade_bits(unsigned word, int lane) {
  constexpr int kShift = 1 << kBitBit;
  constexpr unsigned kLow = kBitBit == 0 ? 0x55555555u : kBitBit == 1 ? 0x33333333u : kBitBit == 2 ? 0x0f0f0f0fu
                            : kBitBit == 3 ? 0x00ff00ffu : 0x0000ffffu;  // bit numbers with a 0 there
  const unsigned other = __shfl_xor_sync(kAllLanes, word, 1 << kLaneBit);
  return lane >> kLaneBit & 1 ? (word & ~kLow) | (other >> kShift & kLow) : (word & kLow) | (other << kShift & ~kLow);
}

// The launch's arguments as every kernel of it sees them.
struct AttentionShape {
  const int *cu_queries, *cu_keys, *slots;
  int num_heads, total_queries;
  bool causal;
  float scale;
};

}  // namespace opt_ds

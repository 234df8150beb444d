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
//
// Offsets are in bytes, and chosen so that little arithmetic is left in the loops: chunk c of a lane's row is `place(row, 0) ^ 16 * c`,
// and 8 or 16 rows further down is a constant away.
template <int kHeadSize>
struct Tile {
  static constexpr int kRowBytes = 2 * kHeadSize, kBytes = kTileRows * kRowBytes;
  static __device__ __forceinline__ unsigned place(int row, int chunk) {
    const int swizzle = kHeadSize == 32 ? row >> 1 & 3 : row & 7;  // two rows of 32 elements span the 32 banks
    return row * kRowBytes + 16 * (chunk ^ swizzle);
  }
};

__device__ __forceinline__ uint4 load_chunk(const unsigned char* shared, unsigned at) {
  return *reinterpret_cast<const uint4*>(shared + at);
}

// kRows rows on their way from global memory to a tile: in registers, so that the loads run while the warp computes.
template <class T, int kHeadSize, int kRows>
struct TileInFlight {
  static constexpr int kChunks = kHeadSize / 8, kPerThread = kRows * kChunks / kAttentionThreads;
  static constexpr int kRowsApart = kAttentionThreads / kChunks;  // of a thread's chunks
  uint4 chunk[kPerThread];

  // Rows at or past `num_rows` read as 0.
  __device__ __forceinline__ void load(const T* rows, long long stride, int first, int num_rows) {
    const int row = first + threadIdx.x / kChunks;
    rows += row * stride + 8 * (threadIdx.x % kChunks);
#pragma unroll
    for (int n = 0; n < kPerThread; ++n) {
      chunk[n] = uint4{0, 0, 0, 0};
      if (row + n * kRowsApart < num_rows) chunk[n] = *reinterpret_cast<const uint4*>(rows + n * kRowsApart * stride);  // MUTATE tail
    }
  }
  static __device__ __forceinline__ unsigned place() { return Tile<kHeadSize>::place(threadIdx.x / kChunks, threadIdx.x % kChunks); }
  __device__ __forceinline__ void store(unsigned char* shared, unsigned at) const {  // at: the tile's offset plus place()
#pragma unroll
    for (int n = 0; n < kPerThread; ++n)
      *reinterpret_cast<uint4*>(shared + at + n * kRowsApart * Tile<kHeadSize>::kRowBytes) = chunk[n];
  }
};

template <class T, int kHeadSize, int kRows>
__device__ __forceinline__ void copy_tile(unsigned char* shared, unsigned at, const T* rows, long long stride, int first, int num_rows) {
  TileInFlight<T, kHeadSize, kRows> in_flight;
  in_flight.load(rows, stride, first, num_rows);
  in_flight.store(shared, at + in_flight.place());
}

// A 32 x 32 bit matrix, one word per lane: swaps the role of a lane number's bit and a bit number's bit. In a few of these, "a word a
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
  const int *cu_queries, *cu_keys, *sample_index;
  int num_heads, total_queries;
  bool causal;
  float scale;
};

}  // namespace opt_ds

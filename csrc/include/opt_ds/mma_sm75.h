// Tensor cores of sm_75 and later: mma.sync.m16n8k8 (sm_75) and m16n8k16 (sm_80, sm_90), fp32 accumulator, operands from shared
// memory by ldmatrix. The same interface as mma_sm70.h, so that the attention kernels are written once.
//
// With g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"), an accumulator of a
// 16x16 tile is two 16x8 ones: element i lies in row g + 8 * (i / 2 % 2) and column 2 * t + i % 2 + 8 * (i / 4).
// Packed in pairs, it is at once the A operand of the next product: P never moves between lanes.
#pragma once
#include "opt_ds/attention_tile.h"

namespace opt_ds {

// kInner: 8 (m16n8k8) or 16 (m16n8k16).
template <class T, int kHeadSize, int kInner>
struct MmaSm75 {
  using Element = T;
  static constexpr bool kSupported = true;
  static constexpr int kStepsAtOnce = kInner == 8 ? 2 : 8;  // fewer loads ahead of their use where registers are short
  static constexpr bool kTilesWaitInRegisters = false;  // ldmatrix fills registers well ahead; there are none to spare
  static constexpr int kStepDims = 16;
  static constexpr int kRowStep = 8;
  static constexpr int kRowLanesA = 1, kRowLanesB = 2;
  struct RowOperand { uint4 a; };

  int lane;
  unsigned row_place, column_place;  // the row that this lane names to ldmatrix, in each of the roles below
  __device__ __forceinline__ MmaSm75() {
    lane = threadIdx.x % kWarp;
    row_place = Tile<kHeadSize>::place(lane % 16, lane / 16);                                  // 8x8 blocks: down, then right
    column_place = Tile<kHeadSize>::place(lane % 8 + 8 * (lane / 16), lane / 8 % 2);           // right, then down
  }
  __device__ __forceinline__ int acc_row() const { return lane / 4; }
  __device__ __forceinline__ int acc_column(int i) const { return 2 * (lane % 4) + (i & 1) + 2 * (i & 4); }

  // c[0..3] += A (16 x 16) B (16 x 8): one instruction, or two of half the inner dimension.
  static __device__ __forceinline__ void instruction(float* c, const uint4& a, unsigned b0, unsigned b1) {
#ifdef __CUDACC__
    if constexpr (kInner == 8) {
#define OPT_DS_M16N8K8(a0, a1, b)                                                                                      \
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"                  \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b))
      OPT_DS_M16N8K8(a.x, a.y, b0);
      OPT_DS_M16N8K8(a.z, a.w, b1);
#undef OPT_DS_M16N8K8
    } else {
#define OPT_DS_M16N8K16(type)                                                                                          \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1))
      if constexpr (IsBFloat16<T>::value) OPT_DS_M16N8K16("bf16");
      else OPT_DS_M16N8K16("f16");
#undef OPT_DS_M16N8K16
    }
#else
    const unsigned registers_a[4] = {a.x, a.y, a.z, a.w}, registers_b[2] = {b0, b1};
    for (int inner = 0; inner < 16; inner += kInner)
      simt::mma_m16n8(registers_a + inner / 4, registers_b + inner / 8, c, kInner, IsBFloat16<T>::value);
#endif
  }

  template <bool kTransposed>
  static __device__ __forceinline__ uint4 ldmatrix(const unsigned char* row) {
    uint4 x;
#ifdef __CUDACC__
    const unsigned address = (unsigned)__cvta_generic_to_shared(row);
    if (kTransposed)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
#else
    simt::ldmatrix_x4(&x.x, row, kTransposed);
#endif
    return x;
  }

  __device__ __forceinline__ uint4 load_rows(const unsigned char* shared, unsigned at, int step) const {
    return ldmatrix<false>(shared + ((row_place + at) ^ 32 * step));
  }
  __device__ __forceinline__ uint4 load_columns(const unsigned char* shared, unsigned at, int step) const {
    return ldmatrix<false>(shared + ((column_place + at) ^ 32 * step));
  }
  static __device__ __forceinline__ void multiply_part(float (&c)[8], const uint4& a, const uint4& b, int part) {
    if (part == 0) instruction(c, a, b.x, b.y);
    else instruction(c + 4, a, b.z, b.w);
  }

  __device__ __forceinline__ RowOperand to_operand(const float (&c)[8]) const {
    return {uint4{pack<T>(c[0], c[1]), pack<T>(c[2], c[3]), pack<T>(c[4], c[5]), pack<T>(c[6], c[7])}};
  }

  template <int kRowTiles>
  __device__ __forceinline__ void accumulate(float (&acc)[kRowTiles][kHeadSize / 16][8], const RowOperand (&p)[kRowTiles],
                                             const unsigned char* shared, unsigned at) const {
#pragma unroll
    for (int n = 0; n < kHeadSize / 16; ++n) {
      const uint4 b = ldmatrix<true>(shared + ((row_place + at) ^ 32 * n));
#pragma unroll
      for (int mt = 0; mt < kRowTiles; ++mt) {
        instruction(acc[mt][n], p[mt].a, b.x, b.y);
        instruction(acc[mt][n] + 4, p[mt].a, b.z, b.w);
      }
    }
  }

  // The four lanes of a row hold two columns of each 8-column chunk; they transpose 4 x 4 words, so that each stores one chunk.
  __device__ __forceinline__ void store(T* rows, long long stride, int row, int num_rows, float (&acc)[kHeadSize / 16][8],
                                        const float (&factor)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = row + lane / 4 + 8 * r;
#pragma unroll
      for (int pair = 0; pair < kHeadSize / 32; ++pair) {
        unsigned word[4];
#pragma unroll
        for (int chunk = 0; chunk < 4; ++chunk) {
          const float(&c)[8] = acc[2 * pair + chunk / 2];
          word[chunk] = pack<T>(c[2 * r + chunk % 2 * 4] * factor[r], c[2 * r + chunk % 2 * 4 + 1] * factor[r]);
        }
        swap_words(word[0], word[1], 1);
        swap_words(word[2], word[3], 1);
        swap_words(word[0], word[2], 2);
        swap_words(word[1], word[3], 2);
        if (at < num_rows)
          *reinterpret_cast<uint4*>(rows + at * stride + 32 * pair + 8 * (lane % 4)) = uint4{word[0], word[1], word[2], word[3]};
      }
    }
  }
  __device__ __forceinline__ void swap_words(unsigned& first, unsigned& second, int distance) const {
    const bool upper = lane & distance;
    const unsigned got = __shfl_xor_sync(kAllLanes, upper ? first : second, distance);
    if (upper) first = got;
    else second = got;
  }

  // ---- dropout: as in mma_sm70.h
  template <int kRowTiles>
  __device__ __forceinline__ int drawn_query() const {
    return lane >> 2 | (lane & 1) << 3 | (kRowTiles == 2 ? (lane & 2) << 3 : 0);
  }
  template <int kRowTiles>
  __device__ __forceinline__ unsigned deal_to_queries(unsigned word) const {
    word = trade_bits<0, 1>(word, lane);
    return kRowTiles == 2 ? trade_bits<1, 2>(word, lane) : word >> 2 * (lane & 2);
  }
  __device__ __forceinline__ int drawn_column() const { return (lane & 3) << 1 | (lane >> 2 & 1) | (lane & 24); }
  __device__ __forceinline__ unsigned deal_to_keys(unsigned word) const {
    return trade_bits<4, 2>(trade_bits<3, 1>(trade_bits<2, 0>(word, lane), lane), lane);
  }
  static __device__ __forceinline__ constexpr int keep_bit_of_queries(int mt, int j, int i) {
    return (i & 3) | mt << 2 | (i & 4) << 1 | j << 4;
  }
  static __device__ __forceinline__ constexpr int keep_bit_of_keys(int mt, int j, int i) {
    return (i & 1) | (i & 4) >> 1 | j << 2 | (i & 2) << 2 | mt << 4;
  }
};

}  // namespace opt_ds

// Tensor cores of sm_70 (V100): mma.sync.m8n8k4, fp16 inputs, fp32 accumulator, and how a warp covers a 16x16 tile with it.
//
// One warp-wide instruction does FOUR independent 8x8x4 products, one per "quad pair": lanes 4p..4p+3 and 4p+16..4p+19.
// With quad = lane % 4, high = lane / 16, o = quad + 4 * high (0..7), e = 0..3 the element of a two-register operand:
//     A row-major     A[m = o][k = e]
//     B column-major  B[k = e][n = o]            B row-major  B[k = quad][n = e + 4 * high]
//     accumulator i   C[m = (lane & 1) + (i & 2) + 4 * high][n = (i & 4) + (lane & 2) + (i & 1)]
// Sources: PTX ISA, "Matrix Fragments for mma.m8n8k4 with .f16 floating point type"; the same facts are CuTe's layouts in
// cutlass/include/cute/atom/mma_traits_sm70.hpp.
//
// A 16x16 tile takes four quad pairs: lane bit 3 (`lower`) picks rows + 8, lane bit 2 (`right`) the column half. Rows are natural;
// columns are permuted so that shared memory is read without bank conflicts, which is free as long as everybody agrees:
//     a column of S (a key):    n of half `right`  <->  n % 4 + 4 * right + 8 * (n / 4)
//     a column of O (a dim):    n of half `right`, tile t of a pair  <->  n % 4 + 4 * t + 8 * right + 16 * (n / 4)
#pragma once
#include "opt_ds/attention_tile.h"

namespace opt_ds {

template <int kHeadSize>
struct MmaSm70 {
  using Element = half;
  static constexpr bool kSupported = true;
  static constexpr int kStepsAtOnce = 16;                  // steps of the inner dimension unrolled in the backward kernel: all
  static constexpr bool kTilesWaitInRegisters = true;      // the backward kernel's next tiles, while it computes
  static constexpr int kStepDims = 8;                      // inner dimensions of an operand (four registers): two instructions
  static constexpr int kRowStep = 2;                       // an accumulator's element i lies in row acc_row + kRowStep * (i / 2 % 2)
  static constexpr int kRowLanesA = 2, kRowLanesB = 4;     // lanes that differ in these bits hold the same rows
  struct RowOperand { unsigned r[4][2]; };                 // 16 rows x 16 inner: own half's inner 0-3, 4-7, the partner half's

  int lane, quad, right, lower, high;
  unsigned row_place, column_place, value_place[2];  // this lane's bytes in a tile, in each of the roles below
  __device__ __forceinline__ MmaSm70() {
    lane = threadIdx.x % kWarp;
    quad = lane & 3, right = lane >> 2 & 1, lower = lane >> 3 & 1, high = lane >> 4;
    row_place = Tile<kHeadSize>::place(quad + 4 * high + 8 * lower, 0);
    column_place = Tile<kHeadSize>::place(quad + 4 * right + 8 * high, 0);
#pragma unroll
    for (int who = 0; who < 2; ++who) value_place[who] = Tile<kHeadSize>::place(4 * (right ^ who) + quad, right + 2 * high);
  }
  __device__ __forceinline__ int acc_row() const { return (lane & 1) + 4 * high + 8 * lower; }
  __device__ __forceinline__ int acc_column(int i) const { return (lane & 2) + (i & 1) + 2 * (i & 4) + 4 * right; }

  template <bool kRowMajorB>
  static __device__ __forceinline__ void instruction(float (&c)[8], unsigned a0, unsigned a1, unsigned b0, unsigned b1) {
#ifdef __CUDACC__
#define OPT_DS_M8N8K4(layout)                                                                                          \
  asm("mma.sync.aligned.m8n8k4.row." layout ".f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, "         \
      "{%0,%1,%2,%3,%4,%5,%6,%7};"                                                                                     \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])                 \
      : "r"(a0), "r"(a1), "r"(b0), "r"(b1))
    if (kRowMajorB) OPT_DS_M8N8K4("row");
    else OPT_DS_M8N8K4("col");
#undef OPT_DS_M8N8K4
#else
    const unsigned a[2] = {a0, a1}, b[2] = {b0, b1};
    simt::mma_m8n8k4(a, b, c, kRowMajorB);
#endif
  }

  // Operand A: 16 rows, 8 dims (chunk `step`); a lane reads its own row. Operand B for a product with the transpose: 16 rows as
  // columns. `at`: offset of the first of these rows.
  __device__ __forceinline__ uint4 load_rows(const unsigned char* shared, unsigned at, int step) const {
    return load_chunk(shared, (row_place + at) ^ 16 * step);
  }
  __device__ __forceinline__ uint4 load_columns(const unsigned char* shared, unsigned at, int step) const {
    return load_chunk(shared, (column_place + at) ^ 16 * step);
  }
  // c += a b^T over the operands' dims, in two parts, so that the caller can put other products between them.
  static __device__ __forceinline__ void multiply_part(float (&c)[8], const uint4& a, const uint4& b, int part) {
    if (part == 0) instruction<false>(c, a.x, a.y, b.x, b.y);
    else instruction<false>(c, a.z, a.w, b.z, b.w);
  }

  // Accumulator -> operand A of the same quad pair, without memory: a lane holds half of its row, lane ^ 2 the other half.
  __device__ __forceinline__ void accumulator_rows(const float (&c)[8], unsigned (&row)[2][2]) const {
    const bool second = lane & 2;  // this lane's row of A is its second accumulator row
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const unsigned row0 = pack<half>(c[4 * g], c[4 * g + 1]), row1 = pack<half>(c[4 * g + 2], c[4 * g + 3]);
      const unsigned got = __shfl_xor_sync(kAllLanes, second ? row0 : row1, 2);  // MUTATE partner
      row[g][0] = second ? got : row0;
      row[g][1] = second ? row1 : got;
    }
  }
  __device__ __forceinline__ RowOperand to_operand(const float (&c)[8]) const {
    RowOperand operand;
    unsigned own[2][2];
    accumulator_rows(c, own);
#pragma unroll
    for (int g = 0; g < 2; ++g)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        operand.r[g][e] = own[g][e];
        operand.r[2 + g][e] = __shfl_xor_sync(kAllLanes, own[g][e], 4);  // the other half's columns
      }
    return operand;
  }

  // acc[.][dims] += p[.] (16 rows x 16 keys) times 16 rows of a tile, at `at`. Each half multiplies its own keys first and its partner's
  // next: only the row that a lane reads depends on it.
  template <int kRowTiles>
  __device__ __forceinline__ void accumulate(float (&acc)[kRowTiles][kHeadSize / 16][8], const RowOperand (&p)[kRowTiles],
                                             const unsigned char* shared, unsigned at) const {
#pragma unroll
    for (int who = 0; who < 2; ++who)
#pragma unroll
      for (int g = 0; g < 2; ++g)
#pragma unroll
        for (int pair = 0; pair < kHeadSize / 32; ++pair) {
          const uint4 b = load_chunk(shared, ((value_place[who] + at) ^ 64 * pair) + 8 * g * Tile<kHeadSize>::kRowBytes);
#pragma unroll
          for (int mt = 0; mt < kRowTiles; ++mt) {
            const unsigned(&a)[2] = p[mt].r[2 * who + g];
            instruction<true>(acc[mt][2 * pair], a[0], a[1], b.x, b.y);
            instruction<true>(acc[mt][2 * pair + 1], a[0], a[1], b.z, b.w);
          }
        }
  }

  // 16 rows of accumulators, times a factor for each of a lane's two rows, to 16-bit rows in global memory.
  __device__ __forceinline__ void store(half* rows, long long stride, int row, int num_rows, float (&acc)[kHeadSize / 16][8],
                                        const float (&factor)[2]) const {
    row += quad + 4 * high + 8 * lower;
#pragma unroll
    for (int pair = 0; pair < kHeadSize / 32; ++pair) {
      unsigned out[2][2][2];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[2 * pair + t][i] *= factor[i >> 1 & 1];
        accumulator_rows(acc[2 * pair + t], out[t]);
      }
#pragma unroll
      for (int g = 0; g < 2; ++g)
        if (row < num_rows)
          *reinterpret_cast<uint4*>(rows + row * stride + 8 * right + 16 * g + 32 * pair) =
              uint4{out[0][g][0], out[0][g][1], out[1][g][0], out[1][g][1]};
    }
  }

  // ---- dropout: a lane computes the keep word of one query (`drawn_query`, of 16 or 32), then lanes exchange bits until each holds the
  // bits of its own accumulator elements (bit numbers: keep_bit).
  template <int kRowTiles>
  __device__ __forceinline__ int drawn_query() const {
    return (lane & 3) | high << 2 | lower << 3 | (kRowTiles == 2 ? right << 4 : 0);
  }
  template <int kRowTiles>
  __device__ __forceinline__ unsigned deal_to_queries(unsigned word) const {
    word = trade_bits<1, 1>(word, lane);
    return kRowTiles == 2 ? trade_bits<2, 2>(word, lane) : word >> 4 * right;
  }
  __device__ __forceinline__ int drawn_column() const { return lane; }
  __device__ __forceinline__ unsigned deal_to_keys(unsigned word) const {
    return trade_bits<4, 2>(trade_bits<3, 3>(trade_bits<0, 0>(word, lane), lane), lane);
  }
  static __device__ __forceinline__ constexpr int keep_bit_of_queries(int mt, int j, int i) {
    return (i & 3) | mt << 2 | (i & 4) << 1 | j << 4;
  }
  static __device__ __forceinline__ constexpr int keep_bit_of_keys(int mt, int j, int i) {
    return (i & 3) | j << 2 | (i & 4) << 1 | mt << 4;
  }
};

}  // namespace opt_ds

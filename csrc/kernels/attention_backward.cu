// Attention, backward, deterministic: no atomics. With P = softmax(scale * q k^T), M the dropout mask (0 or 1) and c its scale:
//     delta = sum_d d_out * out                       one number per query and head
//     d_v = c * (M P)^T d_out     dS = P * (c * M * (d_out v^T) - delta)     d_q = scale * dS k     d_k = scale * dS^T q
// P comes again from q, k and the stored lse; M from the counters that generated it. One kernel owns queries and streams (k, v) to make
// d_q; one owns keys and streams (q, d_out) to make d_k and d_v. Both compute the scores and d_out v^T: seven products where five
// would do, the price of summing in a fixed order without a workspace for d_q. They are one template:
//     scores = own1 stream1^T     gradients = own2 stream2^T     acc2 += dS stream1     keys: acc1 += (M P) stream2
// The factor c is taken out of the sums: delta is stored divided by c, and results are multiplied by c at the end.
#include "opt_ds/attention_block.h"

namespace opt_ds {

template <int kHeadSize>
struct BackwardMemory {  // bytes: [own1, own2][block rows], then [buffer][stream1, stream2][tile]
  static constexpr int kOwn = BlockShape<kHeadSize>::kBlockRows * Tile<kHeadSize>::kRowBytes, kTile = Tile<kHeadSize>::kBytes;
  static constexpr int kBuffers = kHeadSize <= 64 ? 2 : 1;  // 128: two blocks on a multiprocessor hide more than a second buffer
  static constexpr int kTotal = 2 * kOwn + 2 * kBuffers * kTile;
};

// delta / c: eight lanes per row.
template <class T, int kHeadSize>
__global__ void __launch_bounds__(256)
attention_delta(const T* __restrict__ out, const T* __restrict__ d_out, float* __restrict__ delta, int num_heads, int total_queries,
                float factor) {
  const int row = blockIdx.x * 32 + threadIdx.x / 8, head = blockIdx.y;
  float sum = 0.f;
  if (row < total_queries) {
    const size_t begin = ((size_t)row * num_heads + head) * kHeadSize;
#pragma unroll
    for (int d = threadIdx.x % 8 * 8; d < kHeadSize; d += 64) {
      float x[8], y[8];
      load8(out + begin + d, x);
      load8(d_out + begin + d, y);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += x[i] * y[i];
    }
  }
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (row < total_queries && threadIdx.x % 8 == 0) delta[(size_t)head * total_queries + row] = sum * factor;
}

template <class T, int kHeadSize, bool kKeys, bool kDropout>
__global__ void __launch_bounds__(kAttentionThreads, 2)
attention_backward(const AttentionShape shape, const Dropout dropout, const T* __restrict__ own1, const T* __restrict__ own2,
                   const T* __restrict__ stream1, const T* __restrict__ stream2, long long own1_stride, long long own2_stride,
                   long long stream1_stride, long long stream2_stride, const float* __restrict__ lse, const float* __restrict__ delta,
                   T* __restrict__ grad1, T* __restrict__ grad2) {
  using M = Mma<T, kHeadSize>;
  if constexpr (M::kSupported) {
    using Shape = BlockShape<kHeadSize>;
    using Memory = BackwardMemory<kHeadSize>;
    constexpr int kRowTiles = Shape::kRowTiles, kSteps = kHeadSize / M::kStepDims, kTile = Memory::kTile, kOwn = Memory::kOwn;
    constexpr int kGroups = kKeys ? 1 : 2;  // groups of 16 columns at a time: what fits 255 registers
    // The next tiles wait in registers while the warp computes, where there are registers; else they are fetched after that, and
    // the multiprocessor's other block has to hide it.
    constexpr bool kEarly1 = M::kTilesWaitInRegisters && Memory::kBuffers == 2, kEarly2 = kEarly1 && !(kKeys && kDropout && kHeadSize == 64);
    constexpr bool kEarlyLse = kEarly1 && !kDropout;
    OPT_DS_SHARED_MEMORY(shared);

    const int sequence = blockIdx.z, head = blockIdx.y, block_row = blockIdx.x * Shape::kBlockRows;
    const int* cu_own = kKeys ? shape.cu_keys : shape.cu_queries;
    const int* cu_stream = kKeys ? shape.cu_queries : shape.cu_keys;
    const int first_own = cu_own[sequence], num_own = cu_own[sequence + 1] - first_own;
    const int first_stream = cu_stream[sequence], num_stream = cu_stream[sequence + 1] - first_stream;
    if (block_row >= num_own) return;
    // Pointers stay where they are, in constant memory; rows are counted from the beginning of the tensor.
    const int last_stream = first_stream + num_stream;
    const int statistics = head * shape.total_queries + first_own;  // own rows are queries: where their lse and delta begin
    auto of_head = [&](const T* tensor) { return tensor + opaque(blockIdx.y) * kHeadSize; };

    const M mma;
    const int warp = warp_number(), warp_row = block_row + warp * Shape::kWarpRows;
    const int row = warp_row + mma.acc_row();
    const float scale2 = shape.scale * kLog2E;

    copy_tile<T, kHeadSize, Shape::kBlockRows>(shared, 0, of_head(own1), own1_stride, first_own + block_row, first_own + num_own);
    copy_tile<T, kHeadSize, Shape::kBlockRows>(shared, kOwn, of_head(own2), own2_stride, first_own + block_row, first_own + num_own);

    // A query past the end gets lse = +inf: its P is 0 and it contributes nothing.
    float row_lse[kRowTiles][2], row_delta[kRowTiles][2];  // own rows are queries
    if (!kKeys) {
#pragma unroll
      for (int mt = 0; mt < kRowTiles; ++mt)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int query = row + 16 * mt + M::kRowStep * r;
          row_lse[mt][r] = query < num_own ? lse[statistics + query] * kLog2E : -negative_infinity();
          row_delta[mt][r] = query < num_own ? delta[statistics + query] : 0.f;
        }
    }
    float acc1[kRowTiles][kHeadSize / 16][8], acc2[kRowTiles][kHeadSize / 16][8];
    set_zero(acc1);
    set_zero(acc2);

    // The streamed rows that meet this block's rows at all.
    const int begin = kKeys && shape.causal ? block_row : 0;
    const int end = !kKeys && shape.causal ? min(num_stream, block_row + Shape::kBlockRows) : num_stream;
    TileInFlight<T, kHeadSize, kTileRows> next1, next2;
    next1.load(of_head(stream1), stream1_stride, first_stream + begin, last_stream);
    next2.load(of_head(stream2), stream2_stride, first_stream + begin, last_stream);
    const unsigned store_place = next1.place(), own_place = warp * Shape::kWarpRows * Tile<kHeadSize>::kRowBytes;
    unsigned tile1 = 2 * kOwn;  // offset of the tile pair at hand
    next1.store(shared, tile1 + store_place);
    next2.store(shared, tile1 + store_place + kTile);
    __syncthreads();  // BARRIER first_tile

    for (int tile0 = begin; tile0 < end; tile0 += kTileRows) {
      const bool more = tile0 + kTileRows < end;
      if (more && kEarly1) next1.load(of_head(stream1), stream1_stride, first_stream + tile0 + kTileRows, last_stream);
      if (more && kEarly2) next2.load(of_head(stream2), stream2_stride, first_stream + tile0 + kTileRows, last_stream);
      const bool meets = !shape.causal || (kKeys ? tile0 + kTileRows > warp_row : tile0 < warp_row + Shape::kWarpRows);
      const bool edge = (!kKeys && first_stream + tile0 + kTileRows > last_stream) ||
                        (shape.causal && (kKeys ? tile0 < warp_row + Shape::kWarpRows - 1 : tile0 + kTileRows - 1 > warp_row));
      if (meets) {
        unsigned keep = 0;
        const unsigned sample = kDropout ? shape.sample_index[opaque(blockIdx.z)] : 0;  // read again: a register fewer
        if (kDropout && kKeys) {
          keep = mma.deal_to_keys(keep_word(dropout, opaque(warp_row / 32), tile0 + mma.drawn_column(), sample, opaque(blockIdx.y)));  // MUTATE counter
          if (kRowTiles == 1) keep >>= warp_row & 16;
        }
        if (kDropout && !kKeys) {
          const int query = warp_row + mma.template drawn_query<kRowTiles>();
          keep = mma.template deal_to_queries<kRowTiles>(keep_word(dropout, tile0 / 32, query, sample, head));
        }
#pragma unroll 1
        for (int j0 = 0; j0 < 2; j0 += kGroups) {  // unrolled, it would spill
          float scores[kRowTiles][kGroups][8], gradients[kRowTiles][kGroups][8];
          set_zero(scores);
          set_zero(gradients);
          float column_lse[kGroups][4], column_delta[kGroups][4];  // own rows are keys
          auto load_columns_of = [&](float(&values)[4], const float* from, int j, float factor, float missing) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int query = first_stream + tile0 + 16 * (j0 + j) + mma.acc_column((e & 1) + 2 * (e & 2));
              values[e] = query < last_stream ? from[opaque(blockIdx.y) * shape.total_queries + query] * factor : missing;
            }
          };
          if (kKeys && kEarlyLse) {
#pragma unroll
            for (int j = 0; j < kGroups; ++j) load_columns_of(column_lse[j], lse, j, kLog2E, -negative_infinity());
          }
#pragma unroll
          for (int which = 0; which < 2; ++which)
#pragma unroll M::kStepsAtOnce
            for (int step = 0; step < kSteps; ++step) {
              uint4 rows[kRowTiles], columns[kGroups];
#pragma unroll
              for (int mt = 0; mt < kRowTiles; ++mt)
                rows[mt] = mma.load_rows(shared, own_place + which * kOwn + 16 * mt * Tile<kHeadSize>::kRowBytes, step);
#pragma unroll
              for (int j = 0; j < kGroups; ++j)
                columns[j] = mma.load_columns(shared, tile1 + which * kTile + (j0 + j) * (kTile / 2), step);
              multiply<M>(which ? gradients : scores, rows, columns);
            }

          const unsigned keep_group = kGroups == 2 ? keep : kKeys ? keep >> M::keep_bit_of_keys(0, 1, 0) * j0
                                                                  : keep >> M::keep_bit_of_queries(0, 1, 0) * j0;
#pragma unroll
          for (int j = 0; j < kGroups; ++j) {
            if (kKeys && !kEarlyLse) load_columns_of(column_lse[j], lse, j, kLog2E, -negative_infinity());
            if (kKeys) load_columns_of(column_delta[j], delta, j, 1.f, 0.f);  // here, not above: fewer registers during the products
#pragma unroll
            for (int mt = 0; mt < kRowTiles; ++mt)
#pragma unroll
              for (int i = 0; i < 8; ++i) {
                const int e = (i & 1) + (i >> 2 << 1), r = i >> 1 & 1;
                float p = exp2_approximate(scores[mt][j][i] * scale2 - (kKeys ? column_lse[j][e] : row_lse[mt][r]));
                if (edge) {
                  const int own_row = row + 16 * mt + M::kRowStep * r, other = tile0 + 16 * (j0 + j) + mma.acc_column(i);
                  if (kKeys ? own_row > other : first_stream + other >= last_stream || (shape.causal && other > own_row)) p = 0.f;
                }
                float gradient = gradients[mt][j][i], kept = p;
                if (kDropout && !(keep_group >> (kKeys ? M::keep_bit_of_keys(mt, j, i) : M::keep_bit_of_queries(mt, j, i)) & 1))
                  gradient = kept = 0.f;
                scores[mt][j][i] = kept;
                gradients[mt][j][i] = p * (gradient - (kKeys ? column_delta[j][e] : row_delta[mt][r]));
              }
#pragma unroll
            for (int which = kKeys ? 0 : 1; which < 2; ++which) {
              typename M::RowOperand operand[kRowTiles];
#pragma unroll
              for (int mt = 0; mt < kRowTiles; ++mt) operand[mt] = mma.to_operand(which ? gradients[mt][j] : scores[mt][j]);
              mma.template accumulate<kRowTiles>(which ? acc2 : acc1, operand, shared,
                                                 tile1 + (which ? 0 : kTile) + (j0 + j) * (kTile / 2));
            }
          }
        }
      }
      if (more && !kEarly1) next1.load(of_head(stream1), stream1_stride, first_stream + tile0 + kTileRows, last_stream);
      if (more && !kEarly2) next2.load(of_head(stream2), stream2_stride, first_stream + tile0 + kTileRows, last_stream);
      if (Memory::kBuffers == 1) __syncthreads();  // BARRIER single_buffer
      if (Memory::kBuffers == 2) tile1 = 4 * kOwn + 2 * kTile - tile1;  // the other pair
      if (more) {
        next1.store(shared, tile1 + store_place);
        next2.store(shared, tile1 + store_place + kTile);
      }
      __syncthreads();  // BARRIER tile
    }

    // Where the results go is worked out only now: it would occupy registers all through the loop.
    const int own_begin = cu_own[opaque(blockIdx.z)], own_rows = cu_own[opaque(blockIdx.z) + 1] - own_begin;
    const long long grad_stride = (long long)shape.num_heads * kHeadSize;
    const long long grad_begin = own_begin * grad_stride + opaque(blockIdx.y) * kHeadSize;
    const float c = kDropout ? dropout.scale : 1.f;
    const float factor1[2] = {c, c}, factor2[2] = {c * shape.scale, c * shape.scale};
#pragma unroll
    for (int mt = 0; mt < kRowTiles; ++mt) {
      mma.store(grad2 + grad_begin, grad_stride, warp_row + 16 * mt, own_rows, acc2[mt], factor2);
      if (kKeys) mma.store(grad1 + grad_begin, grad_stride, warp_row + 16 * mt, own_rows, acc1[mt], factor1);
    }
  } else {
    stop_without_mma();
  }
}

#ifndef __CUDACC_RTC__
template <class T, int kHeadSize, bool kDropout>
int launch_attention_backward(const OptDsAttentionBackward& b, void* stream) {
  const OptDsAttention& a = b.forward;
  const AttentionShape shape = shape_of(a);
  const Dropout dropout = make_dropout(a.dropout);
  constexpr int kBlockRows = BlockShape<kHeadSize>::kBlockRows, kBytes = BackwardMemory<kHeadSize>::kTotal;
  const dim3 grid_queries((a.max_queries + kBlockRows - 1) / kBlockRows, a.num_heads, a.num_sequences);
  const dim3 grid_keys((a.max_keys + kBlockRows - 1) / kBlockRows, a.num_heads, a.num_sequences);
  const T *q = (const T*)a.q, *k = (const T*)a.k, *v = (const T*)a.v, *out = (const T*)a.out, *d_out = (const T*)b.d_out;
  T *d_q = (T*)b.d_q, *d_k = (T*)b.d_k, *d_v = (T*)b.d_v, *none = nullptr;
  const float* lse = a.lse;
  float* delta = b.delta;
  const long long q_stride = a.q_stride, k_stride = a.k_stride, v_stride = a.v_stride, out_stride = (long long)a.num_heads * kHeadSize;
  const float delta_factor = kDropout ? 1.f / dropout.scale : 1.f;
  const int num_heads = a.num_heads, total_queries = a.total_queries;
  if (total_queries)
    OPT_DS_LAUNCH((attention_delta<T, kHeadSize>), dim3((total_queries + 31) / 32, num_heads), 256, 0, stream, out, d_out, delta,
                  num_heads, total_queries, delta_factor);
  if (a.total_keys)
    OPT_DS_LAUNCH((attention_backward<T, kHeadSize, true, kDropout>), grid_keys, kAttentionThreads, kBytes, stream, shape, dropout, k, v,
                  q, d_out, k_stride, v_stride, q_stride, out_stride, lse, delta, d_v, d_k);
  if (total_queries)
    OPT_DS_LAUNCH((attention_backward<T, kHeadSize, false, kDropout>), grid_queries, kAttentionThreads, kBytes, stream, shape, dropout,
                  q, d_out, k, v, q_stride, out_stride, k_stride, v_stride, lse, delta, none, d_q);
  return last_error();
}
#endif

}  // namespace opt_ds

#ifndef __CUDACC_RTC__
extern "C" int opt_ds_attention_backward(const OptDsAttentionBackward* b, void* stream) {
  using namespace opt_ds;
  if (!tensor_cores_take(b->forward)) return plain_attention_backward(*b, stream);
  return with_mma_kernel(b->forward, [&](auto element, auto size) {
    using T = decltype(element);
    return b->forward.dropout.probability > 0 ? launch_attention_backward<T, decltype(size)::value, true>(*b, stream)
                                              : launch_attention_backward<T, decltype(size)::value, false>(*b, stream);
  });
}
#endif

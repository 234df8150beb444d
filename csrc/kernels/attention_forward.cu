// Attention, forward, with variable lengths and without a score matrix in memory (Dao et al. 2022, "FlashAttention"):
//     out = dropout(softmax(scale * q k^T)) v     lse = log(sum(exp(scale * q k^T)))
// Q, the scores, the probabilities and the output stay in registers; only K and V tiles pass through shared memory, double buffered,
// one barrier per tile. The softmax is "online": a running maximum and sum per row, and the output rescaled when the maximum grows.
#include "opt_ds/attention_block.h"

namespace opt_ds {

template <int kHeadSize>
struct ForwardMemory {  // bytes: [buffer][K, V][tile]; the queries pass through the same space once, before the first tile
  static constexpr int kTile = Tile<kHeadSize>::kBytes;
  static constexpr int kQueries = BlockShape<kHeadSize>::kBlockRows * Tile<kHeadSize>::kRowBytes;
  static constexpr int kTotal = 4 * kTile > kQueries ? 4 * kTile : kQueries;
};

template <class T, int kHeadSize, bool kDropout>
__global__ void __launch_bounds__(kAttentionThreads, 2)
attention_forward(const AttentionShape shape, const Dropout dropout, const T* __restrict__ q, const T* __restrict__ k,
                  const T* __restrict__ v, long long q_stride, long long k_stride, long long v_stride, T* __restrict__ out,
                  float* __restrict__ lse) {
  using M = Mma<T, kHeadSize>;
  if constexpr (M::kSupported) {
    using Shape = BlockShape<kHeadSize>;
    constexpr int kRowTiles = Shape::kRowTiles, kSteps = kHeadSize / M::kStepDims, kTile = ForwardMemory<kHeadSize>::kTile;
    OPT_DS_SHARED_MEMORY(shared);

    const int sequence = blockIdx.z, head = blockIdx.y, block_row = blockIdx.x * Shape::kBlockRows;
    const int first_query = shape.cu_queries[sequence], num_queries = shape.cu_queries[sequence + 1] - first_query;
    const int first_key = shape.cu_keys[sequence], num_keys = shape.cu_keys[sequence + 1] - first_key;
    if (block_row >= num_queries) return;
    const long long out_stride = (long long)shape.num_heads * kHeadSize;
    q += first_query * q_stride + head * kHeadSize;
    k += first_key * k_stride + head * kHeadSize;
    v += first_key * v_stride + head * kHeadSize;
    out += first_query * out_stride + head * kHeadSize;
    lse += (size_t)head * shape.total_queries + first_query;

    const M mma;
    const int warp = warp_number(), warp_row = block_row + warp * Shape::kWarpRows;
    const int row = warp_row + mma.acc_row();  // accumulator rows: row + 16 * mt + kRowStep * r
    const unsigned sample = kDropout ? shape.sample_index[sequence] : 0;

    copy_tile<T, kHeadSize, Shape::kBlockRows>(shared, 0, q, q_stride, block_row, num_queries);
    __syncthreads();  // BARRIER queries
    uint4 queries[kSteps][kRowTiles];
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int mt = 0; mt < kRowTiles; ++mt)
        queries[step][mt] = mma.load_rows(shared, (warp * Shape::kWarpRows + 16 * mt) * Tile<kHeadSize>::kRowBytes, step);
    __syncthreads();  // BARRIER queries_read

    float acc[kRowTiles][kHeadSize / 16][8], row_max[kRowTiles][2], row_sum[kRowTiles][2];  // row_sum: this lane's share
    set_zero(acc);
#pragma unroll
    for (int mt = 0; mt < kRowTiles; ++mt)
#pragma unroll
      for (int r = 0; r < 2; ++r) row_max[mt][r] = negative_infinity(), row_sum[mt][r] = 0.f;
    const float scale2 = shape.scale * kLog2E;  // exp(scale * x) = 2^(scale2 * x)
    const int end_key = shape.causal ? min(num_keys, block_row + Shape::kBlockRows) : num_keys;

    TileInFlight<T, kHeadSize, kTileRows> next_k, next_v;
    next_k.load(k, k_stride, 0, num_keys);
    next_v.load(v, v_stride, 0, num_keys);
    const unsigned store_place = next_k.place();
    next_k.store(shared, store_place);
    next_v.store(shared, store_place + kTile);
    __syncthreads();  // BARRIER first_tile

    unsigned tile_k = 0;  // offset of the tile pair at hand: 0 and 2 * kTile in turn
    for (int key0 = 0; key0 < end_key; key0 += kTileRows, tile_k ^= 2 * kTile) {
      const bool more = key0 + kTileRows < end_key;
      if (more) {  // on their way during the products below
        next_k.load(k, k_stride, key0 + kTileRows, num_keys);
        next_v.load(v, v_stride, key0 + kTileRows, num_keys);
      }
      if (!shape.causal || key0 < warp_row + Shape::kWarpRows) {  // the whole warp takes the same branch
        float scores[kRowTiles][2][8];
        set_zero(scores);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const uint4 columns[2] = {mma.load_columns(shared, tile_k, step), mma.load_columns(shared, tile_k + kTile / 2, step)};
          multiply<M>(scores, queries[step], columns);
        }

        if (key0 + kTileRows > num_keys || (shape.causal && key0 + kTileRows - 1 > warp_row)) {  // tiles on an edge
          const int last_key = num_keys - 1;
#pragma unroll
          for (int mt = 0; mt < kRowTiles; ++mt)
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
              for (int i = 0; i < 8; ++i) {
                const int key = key0 + 16 * j + mma.acc_column(i), query = row + 16 * mt + M::kRowStep * (i >> 1 & 1);
                if (key > (shape.causal ? min(query, last_key) : last_key)) scores[mt][j][i] = negative_infinity();  // MUTATE mask
              }
        }

        unsigned keep = 0;
        if (kDropout) {
          const int query = warp_row + mma.template drawn_query<kRowTiles>();
          keep = mma.template deal_to_queries<kRowTiles>(keep_word(dropout, key0 / 32, query, sample, head));
        }

        // The first tile holds key 0, which no row masks: from then on the maximum is finite.
        typename M::RowOperand probabilities[2][kRowTiles];
#pragma unroll
        for (int mt = 0; mt < kRowTiles; ++mt) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float maximum = row_max[mt][r];
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
              for (int e = 0; e < 4; ++e) maximum = fmaxf(maximum, scores[mt][j][(e & 1) + 2 * r + 2 * (e & 2)]);
            maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, M::kRowLanesA));
            maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, M::kRowLanesB));
            const float rescale = exp2_approximate((row_max[mt][r] - maximum) * scale2), shift = maximum * scale2;
            row_max[mt][r] = maximum;
            float sum = row_sum[mt][r] * rescale;
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const int i = (e & 1) + 2 * r + 2 * (e & 2);
                float& p = scores[mt][j][i];
                p = exp2_approximate(p * scale2 - shift);
                sum += p;  // the denominator counts dropped probabilities too
                if (kDropout && !(keep >> M::keep_bit_of_queries(mt, j, i) & 1)) p = 0.f;
              }
            row_sum[mt][r] = sum;
#pragma unroll
            for (int n = 0; n < kHeadSize / 16; ++n)
#pragma unroll
              for (int e = 0; e < 4; ++e) acc[mt][n][(e & 1) + 2 * r + 2 * (e & 2)] *= rescale;
          }
#pragma unroll
          for (int j = 0; j < 2; ++j) probabilities[j][mt] = mma.to_operand(scores[mt][j]);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) mma.template accumulate<kRowTiles>(acc, probabilities[j], shared, tile_k + kTile + j * (kTile / 2));
      }
      if (more) {
        next_k.store(shared, (tile_k ^ 2 * kTile) + store_place);
        next_v.store(shared, (tile_k ^ 2 * kTile) + store_place + kTile);
      }
      __syncthreads();  // BARRIER tile
    }

#pragma unroll
    for (int mt = 0; mt < kRowTiles; ++mt) {
      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = row_sum[mt][r];
        sum += __shfl_xor_sync(kAllLanes, sum, M::kRowLanesA);
        sum += __shfl_xor_sync(kAllLanes, sum, M::kRowLanesB);
        factor[r] = sum > 0.f ? __fdividef(kDropout ? dropout.scale : 1.f, sum) : 0.f;  // IEEE division is a call
        const int query = row + 16 * mt + M::kRowStep * r;
        if (mma.lane % (2 * M::kRowLanesB) / M::kRowLanesA == 0 && query < num_queries)
          lse[query] = sum > 0.f ? row_max[mt][r] * shape.scale + logf(sum) : negative_infinity();
      }
      mma.store(out, out_stride, warp_row + 16 * mt, num_queries, acc[mt], factor);
    }
  } else {
    stop_without_mma();
  }
}

#ifndef __CUDACC_RTC__
template <class T, int kHeadSize, bool kDropout>
int launch_attention_forward(const OptDsAttention& a, void* stream) {
  const AttentionShape shape = shape_of(a);
  const Dropout dropout = make_dropout(a.dropout);
  const dim3 grid((a.max_queries + BlockShape<kHeadSize>::kBlockRows - 1) / BlockShape<kHeadSize>::kBlockRows, a.num_heads,
                  a.num_sequences);
  const T *q = (const T*)a.q, *k = (const T*)a.k, *v = (const T*)a.v;
  T* out = (T*)a.out;
  float* lse = a.lse;
  const long long q_stride = a.q_stride, k_stride = a.k_stride, v_stride = a.v_stride;
  OPT_DS_LAUNCH((attention_forward<T, kHeadSize, kDropout>), grid, kAttentionThreads, ForwardMemory<kHeadSize>::kTotal,
                stream, shape, dropout, q, k, v, q_stride, k_stride, v_stride, out, lse);
  return last_error();
}
#endif

}  // namespace opt_ds

#ifndef __CUDACC_RTC__
extern "C" int opt_ds_attention_forward(const OptDsAttention* a, void* stream) {
  using namespace opt_ds;
  if (a->total_queries == 0) return 0;
  if (!tensor_cores_take(*a)) return plain_attention_forward(*a, stream);
  return with_mma_kernel(*a, [&](auto element, auto size) {
    using T = decltype(element);
    return a->dropout.probability > 0 ? launch_attention_forward<T, decltype(size)::value, true>(*a, stream)
                                      : launch_attention_forward<T, decltype(size)::value, false>(*a, stream);
  });
}
#endif

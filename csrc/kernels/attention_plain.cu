// Attention for what tensor cores do not take: fp32, bf16 before sm_80, odd head sizes (up to 256). Correct and deterministic, not
// fast: one warp per row, no shared memory, all sums in fp32.
//     forward, d_q   a warp owns a query; a lane processes one key of 32, then lanes own dims
//     d_k, d_v       a warp owns a key; a lane processes one query of 32
#include "opt_ds/attention_block.h"

namespace opt_ds {

constexpr int kMaxDims = 8;  // dims per lane: head sizes up to 256

// Where a warp's row and its partners of the other side are.
struct PlainRow {
  int own, num_own, num_other, first_own, first_other, head, sequence;
  bool exists;
  __device__ __forceinline__ PlainRow(const int* cu_own, const int* cu_other) {
    own = blockIdx.x * kAttentionWarps + threadIdx.x / kWarp;
    head = blockIdx.y, sequence = blockIdx.z;
    first_own = cu_own[sequence], num_own = cu_own[sequence + 1] - first_own;
    first_other = cu_other[sequence], num_other = cu_other[sequence + 1] - first_other;
    exists = own < num_own;
  }
};

template <class T>
__device__ __forceinline__ float dot(const T* a, const T* b, int size) {
  float sum = 0.f;
  for (int d = 0; d < size; ++d) sum += to_float(a[d]) * to_float(b[d]);
  return sum;
}

__device__ __forceinline__ float warp_max(float x) {
  for (int distance = kWarp / 2; distance; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

__device__ __forceinline__ bool kept(const Dropout& dropout, bool active, int key, int query, unsigned sample, int head) {
  return !active || (keep_word(dropout, key / 32, query, sample, head) >> (key % 32) & 1);
}

// acc[n] += sum over lanes l of weight(l) * rows[l][dim of this lane]
template <class T>
__device__ __forceinline__ void add_rows(float (&acc)[kMaxDims], float weight, const T* rows, long long stride, int num_rows, int size) {
  for (int l = 0; l < kWarp; ++l) {
    const float w = __shfl_sync(kAllLanes, weight, l);
    if (l >= num_rows) continue;
#pragma unroll
    for (int n = 0; n < kMaxDims; ++n) {
      const int d = threadIdx.x % kWarp + kWarp * n;
      if (d < size) acc[n] += w * to_float(rows[l * stride + d]);
    }
  }
}

template <class T>
__device__ __forceinline__ void write_row(T* row, const float (&acc)[kMaxDims], float factor, int size) {
#pragma unroll
  for (int n = 0; n < kMaxDims; ++n) {
    const int d = threadIdx.x % kWarp + kWarp * n;
    if (d < size) row[d] = from_float<T>(acc[n] * factor);
  }
}

template <class T>
__global__ void __launch_bounds__(kAttentionThreads)
attention_plain_forward(const AttentionShape shape, const Dropout dropout, bool drops, int size, const T* __restrict__ q,
                        const T* __restrict__ k, const T* __restrict__ v, long long q_stride, long long k_stride, long long v_stride,
                        T* __restrict__ out, float* __restrict__ lse) {
  const PlainRow row(shape.cu_queries, shape.cu_keys);
  if (!row.exists) return;
  const int lane = threadIdx.x % kWarp, end = shape.causal ? min(row.num_other, row.own + 1) : row.num_other;
  const unsigned sample = drops ? shape.sample_index[row.sequence] : 0;
  q += (row.first_own + row.own) * q_stride + row.head * size;
  k += row.first_other * k_stride + row.head * size;
  v += row.first_other * v_stride + row.head * size;
  float acc[kMaxDims] = {}, maximum = negative_infinity(), sum = 0.f;
  for (int key0 = 0; key0 < end; key0 += kWarp) {
    const int key = key0 + lane;
    const float score = key < end ? dot(q, k + key * k_stride, size) * shape.scale : negative_infinity();
    const float new_maximum = fmaxf(maximum, warp_max(score)), rescale = expf(maximum - new_maximum);
    float p = expf(score - new_maximum);
    sum = sum * rescale + warp_sum(p);
    maximum = new_maximum;
    if (!kept(dropout, drops, key, row.own, sample, row.head)) p = 0.f;
#pragma unroll
    for (int n = 0; n < kMaxDims; ++n) acc[n] *= rescale;
    add_rows(acc, p, v + key0 * v_stride, v_stride, end - key0, size);
  }
  const size_t at = (size_t)(row.first_own + row.own) * shape.num_heads + row.head;
  write_row(out + at * size, acc, sum > 0.f ? (drops ? dropout.scale : 1.f) / sum : 0.f, size);
  if (lane == 0)
    lse[(size_t)row.head * shape.total_queries + row.first_own + row.own] = sum > 0.f ? maximum + logf(sum) : negative_infinity();
}

template <class T>
__global__ void __launch_bounds__(kAttentionThreads)
attention_plain_backward_queries(const AttentionShape shape, const Dropout dropout, bool drops, int size, const T* __restrict__ q,
                                 const T* __restrict__ k, const T* __restrict__ v, long long q_stride, long long k_stride,
                                 long long v_stride, const T* __restrict__ out, const T* __restrict__ d_out,
                                 const float* __restrict__ lse, float* __restrict__ delta, T* __restrict__ d_q) {
  const PlainRow row(shape.cu_queries, shape.cu_keys);
  if (!row.exists) return;
  const int lane = threadIdx.x % kWarp, end = shape.causal ? min(row.num_other, row.own + 1) : row.num_other;
  const unsigned sample = drops ? shape.sample_index[row.sequence] : 0;
  const size_t at = ((size_t)(row.first_own + row.own) * shape.num_heads + row.head) * size;
  const size_t number = (size_t)row.head * shape.total_queries + row.first_own + row.own;
  q += (row.first_own + row.own) * q_stride + row.head * size;
  k += row.first_other * k_stride + row.head * size;
  v += row.first_other * v_stride + row.head * size;
  float own_delta = 0.f;
  for (int d = lane; d < size; d += kWarp) own_delta += to_float(out[at + d]) * to_float(d_out[at + d]);
  own_delta = warp_sum(own_delta);
  if (lane == 0) delta[number] = own_delta;
  float acc[kMaxDims] = {};
  for (int key0 = 0; key0 < end; key0 += kWarp) {
    const int key = key0 + lane;
    float d_score = 0.f;
    if (key < end) {
      const float p = expf(dot(q, k + key * k_stride, size) * shape.scale - lse[number]);
      float gradient = dot(d_out + at, v + key * v_stride, size);
      if (drops) gradient = kept(dropout, drops, key, row.own, sample, row.head) ? gradient * dropout.scale : 0.f;
      d_score = p * (gradient - own_delta);
    }
    add_rows(acc, d_score, k + key0 * k_stride, k_stride, end - key0, size);
  }
  write_row(d_q + at, acc, shape.scale, size);
}

// After the kernel above: it reads delta.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads)
attention_plain_backward_keys(const AttentionShape shape, const Dropout dropout, bool drops, int size, const T* __restrict__ q,
                              const T* __restrict__ k, const T* __restrict__ v, long long q_stride, long long k_stride,
                              long long v_stride, const T* __restrict__ d_out, const float* __restrict__ lse,
                              const float* __restrict__ delta, T* __restrict__ d_k, T* __restrict__ d_v) {
  const PlainRow row(shape.cu_keys, shape.cu_queries);
  if (!row.exists) return;
  const int lane = threadIdx.x % kWarp, begin = shape.causal ? row.own / kWarp * kWarp : 0;
  const unsigned sample = drops ? shape.sample_index[row.sequence] : 0;
  const long long out_stride = (long long)shape.num_heads * size;
  const size_t at = ((size_t)(row.first_own + row.own) * shape.num_heads + row.head) * size;
  q += row.first_other * q_stride + row.head * size;
  d_out += row.first_other * out_stride + row.head * size;
  k += (row.first_own + row.own) * k_stride + row.head * size;
  v += (row.first_own + row.own) * v_stride + row.head * size;
  lse += (size_t)row.head * shape.total_queries + row.first_other;
  delta += (size_t)row.head * shape.total_queries + row.first_other;
  float acc_k[kMaxDims] = {}, acc_v[kMaxDims] = {};
  for (int query0 = begin; query0 < row.num_other; query0 += kWarp) {
    const int query = query0 + lane;
    float p = 0.f, d_score = 0.f;
    if (query < row.num_other && !(shape.causal && query < row.own)) {
      p = expf(dot(q + query * q_stride, k, size) * shape.scale - lse[query]);
      float gradient = dot(d_out + query * out_stride, v, size), factor = 1.f;
      if (drops) factor = kept(dropout, drops, row.own, query, sample, row.head) ? dropout.scale : 0.f;
      d_score = p * (gradient * factor - delta[query]);
      p *= factor;
    }
    add_rows(acc_k, d_score, q + query0 * q_stride, q_stride, row.num_other - query0, size);
    add_rows(acc_v, p, d_out + query0 * out_stride, out_stride, row.num_other - query0, size);
  }
  write_row(d_k + at, acc_k, shape.scale, size);
  write_row(d_v + at, acc_v, 1.f, size);
}

#ifndef __CUDACC_RTC__
template <class Function>
int with_plain_type(const OptDsAttention& a, Function&& f) {
  if (a.head_size > kMaxDims * kWarp) return -1;
  if (a.type == kOptDsFloat32) return f(float());
  if (a.type == kOptDsFloat16) return f(half());
  if (a.type == kOptDsBFloat16) return f(bfloat16());
  return -1;
}

int plain_attention_forward(const OptDsAttention& a, void* stream) {
  const AttentionShape shape = shape_of(a);
  const Dropout dropout = make_dropout(a.dropout);
  const bool drops = a.dropout.probability > 0;
  const dim3 grid((a.max_queries + kAttentionWarps - 1) / kAttentionWarps, a.num_heads, a.num_sequences);
  const long long q_stride = a.q_stride, k_stride = a.k_stride, v_stride = a.v_stride;
  const int size = a.head_size;
  float* lse = a.lse;
  return with_plain_type(a, [&](auto element) {
    using T = decltype(element);
    const T *q = (const T*)a.q, *k = (const T*)a.k, *v = (const T*)a.v;
    T* out = (T*)a.out;
    OPT_DS_LAUNCH(attention_plain_forward<T>, grid, kAttentionThreads, 0, stream, shape, dropout, drops, size, q, k, v, q_stride,
                  k_stride, v_stride, out, lse);
    return last_error();
  });
}

int plain_attention_backward(const OptDsAttentionBackward& b, void* stream) {
  const OptDsAttention& a = b.forward;
  const AttentionShape shape = shape_of(a);
  const Dropout dropout = make_dropout(a.dropout);
  const bool drops = a.dropout.probability > 0;
  const dim3 grid_queries((a.max_queries + kAttentionWarps - 1) / kAttentionWarps, a.num_heads, a.num_sequences);
  const dim3 grid_keys((a.max_keys + kAttentionWarps - 1) / kAttentionWarps, a.num_heads, a.num_sequences);
  const long long q_stride = a.q_stride, k_stride = a.k_stride, v_stride = a.v_stride;
  const int size = a.head_size, total_queries = a.total_queries, total_keys = a.total_keys;
  const float* lse = a.lse;
  float* delta = b.delta;
  return with_plain_type(a, [&](auto element) {
    using T = decltype(element);
    const T *q = (const T*)a.q, *k = (const T*)a.k, *v = (const T*)a.v, *out = (const T*)a.out, *d_out = (const T*)b.d_out;
    T *d_q = (T*)b.d_q, *d_k = (T*)b.d_k, *d_v = (T*)b.d_v;
    if (total_queries)
      OPT_DS_LAUNCH(attention_plain_backward_queries<T>, grid_queries, kAttentionThreads, 0, stream, shape, dropout, drops, size, q, k,
                    v, q_stride, k_stride, v_stride, out, d_out, lse, delta, d_q);
    if (total_keys)
      OPT_DS_LAUNCH(attention_plain_backward_keys<T>, grid_keys, kAttentionThreads, 0, stream, shape, dropout, drops, size, q, k, v,
                    q_stride, k_stride, v_stride, d_out, lse, delta, d_k, d_v);
    return last_error();
  });
}
#endif

}  // namespace opt_ds

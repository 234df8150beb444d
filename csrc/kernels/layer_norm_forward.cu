// Bias + dropout + residual + LayerNorm, forward, in one pass over memory:
//     total = residual + dropout(x + input_bias)        normed = (total - mean) / sqrt(variance + eps) * weight + bias
// PyTorch's own sequence reads and writes the row once per step of that line. Here it lives in registers from the load of x and
// residual to the store of total and normed. Statistics are fp32, of `total` as it is stored (the backward pass reads it back),
// and two-pass (first the mean, then the squared deviations), which costs nothing: the row is at hand.
#include "opt_ds/row_layout.h"

namespace opt_ds {

template <class T, class Layout>
__global__ void __launch_bounds__(Layout::kBlockThreads, 512 / Layout::kBlockThreads)
layer_norm_forward(const T* __restrict__ x, const T* __restrict__ input_bias, const T* __restrict__ residual,
                   const int* __restrict__ row_keys, const T* __restrict__ weight, const T* __restrict__ bias, float eps,
                   const Dropout dropout, T* __restrict__ total, T* __restrict__ normed, float* __restrict__ mean,
                   float* __restrict__ rstd, int rows, int width) {
  OPT_DS_SHARED_MEMORY(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int row = blockIdx.x * Layout::kRowsPerBlock + Layout::row_in_block();
  if (row >= rows) return;  // a whole warp, or a whole block
  const size_t begin = (size_t)row * width;

  float value[Layout::kChunks][8], sum = 0.f, unused = 0.f;
#pragma unroll
  for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
    const int column = Layout::column(chunk);
    if (column >= width) continue;
    float(&v)[8] = value[chunk];
    load8(x + begin + column, v);
    if (input_bias) {
      float b[8];
      load8(input_bias + column, b);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = to_float(from_float<T>(v[i] + b[i]));  // rounded as a linear layer's output would be
    }
    if (row_keys) {
      const unsigned keep = keep8(dropout, row_keys + 2 * row, column);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = keep >> i & 1 ? v[i] * dropout.scale : 0.f;
    }
    if (residual) {
      float r[8];
      load8(residual + begin + column, r);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += r[i];
    }
    if (total) {
      store8(total + begin + column, v);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = to_float(from_float<T>(v[i]));
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += v[i];
  }
  Layout::sum(sum, unused, scratch);
  const float mu = sum / width;

  float squares = 0.f;
#pragma unroll
  for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
    if (Layout::column(chunk) >= width) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += (value[chunk][i] - mu) * (value[chunk][i] - mu);
  }
  Layout::sum(squares, unused, scratch + 2 * Layout::kWarpsPerRow);
  const float inverse_deviation = rsqrtf(squares / width + eps);

#pragma unroll
  for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
    const int column = Layout::column(chunk);
    if (column >= width) continue;
    float w[8], b[8];
    load8(weight + column, w);
    load8(bias + column, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = (value[chunk][i] - mu) * inverse_deviation * w[i] + b[i];
    store8(normed + begin + column, w);
  }
  if (Layout::column(0) == 0) {
    mean[row] = mu;
    rstd[row] = inverse_deviation;
  }
}

// Any width and alignment: one block per row, element by element; the row is read again for each step. Correct, not fast.
template <class T>
__global__ void __launch_bounds__(256)
layer_norm_forward_any(const T* __restrict__ x, const T* __restrict__ input_bias, const T* __restrict__ residual,
                       const int* __restrict__ row_keys, const T* __restrict__ weight, const T* __restrict__ bias, float eps,
                       const Dropout dropout, T* __restrict__ total, T* __restrict__ normed, float* __restrict__ mean,
                       float* __restrict__ rstd, int width) {
  using Layout = RowLayout<256, 1>;
  OPT_DS_SHARED_MEMORY(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const int row = blockIdx.x;
  const size_t begin = (size_t)row * width;
  float sum = 0.f, squares = 0.f, unused = 0.f;
  for (int column = threadIdx.x; column < width; column += 256) {
    float v = to_float(x[begin + column]);
    if (input_bias) v = to_float(from_float<T>(v + to_float(input_bias[column])));
    if (row_keys) v = keep8(dropout, row_keys + 2 * row, column) & 1 ? v * dropout.scale : 0.f;
    if (residual) v += to_float(residual[begin + column]);
    if (total) total[begin + column] = from_float<T>(v);
    sum += to_float(from_float<T>(v));
  }
  Layout::sum(sum, unused, scratch);
  const float mu = sum / width;
  const T* row_total = (total ? total : x) + begin;  // each thread reads what it wrote itself
  for (int column = threadIdx.x; column < width; column += 256) {
    const float deviation = to_float(row_total[column]) - mu;
    squares += deviation * deviation;
  }
  Layout::sum(squares, unused, scratch + 2 * Layout::kWarpsPerRow);
  const float inverse_deviation = rsqrtf(squares / width + eps);
  for (int column = threadIdx.x; column < width; column += 256) {
    const float xhat = (to_float(row_total[column]) - mu) * inverse_deviation;
    normed[begin + column] = from_float<T>(xhat * to_float(weight[column]) + to_float(bias[column]));
  }
  if (threadIdx.x == 0) {
    mean[row] = mu;
    rstd[row] = inverse_deviation;
  }
}

}  // namespace opt_ds

#ifndef __CUDACC_RTC__
extern "C" int opt_ds_layer_norm_forward(const OptDsLayerNormForward* a, void* stream) {
  using namespace opt_ds;
  if (a->rows == 0) return 0;
  const Dropout dropout = make_dropout(a->dropout);
  const int* row_keys = a->dropout.probability > 0 ? a->row_keys : nullptr;
  const bool aligned = aligned16(a->x) && aligned16(a->input_bias) && aligned16(a->residual) && aligned16(a->weight) &&
                       aligned16(a->bias) && aligned16(a->total) && aligned16(a->normed);
  return with_type(a->type, [&](auto element) {
    using T = decltype(element);
    const T *x = (const T*)a->x, *input_bias = (const T*)a->input_bias, *residual = (const T*)a->residual;
    const T *weight = (const T*)a->weight, *bias = (const T*)a->bias;
    T *total = (T*)a->total, *normed = (T*)a->normed;
    float *mean = a->mean, *rstd = a->rstd;
    const int rows = a->rows, width = a->width;
    const float eps = a->eps;
    if (width % 8 || width > kWideWidth || !aligned) {
      OPT_DS_LAUNCH(layer_norm_forward_any<T>, rows, 256, 128, stream, x, input_bias, residual, row_keys, weight, bias, eps, dropout,
                    total, normed, mean, rstd, width);
      return last_error();
    }
    with_row_layout(width, [&](auto layout) {
      using Layout = decltype(layout);
      const int blocks = (rows + Layout::kRowsPerBlock - 1) / Layout::kRowsPerBlock;
      OPT_DS_LAUNCH((layer_norm_forward<T, Layout>), blocks, Layout::kBlockThreads, 128, stream, x, input_bias, residual, row_keys,
                    weight, bias, eps, dropout, total, normed, mean, rstd, rows, width);
    });
    return last_error();
  });
}
#endif

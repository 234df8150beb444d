// Bias + dropout + residual + LayerNorm, backward, in one pass over memory. With xhat = (total - mean) * rstd and g = d_normed *
// weight, averages taken over the row:
//     d_residual = d_total + rstd * (g - avg(g) - xhat * avg(g * xhat))      d_x = the same where dropout kept, times its scale
//     d_weight = sum over rows of d_normed * xhat      d_bias = ... of d_normed      d_input_bias = ... of d_x
// The sums over rows are deterministic, without atomics: a block iterates over rows block, block + blocks, ... and keeps its columns'
// sums in registers; it writes one partial row per sum; a second kernel adds the partial rows in order.
#include "opt_ds/row_layout.h"

namespace opt_ds {

template <class T, class Layout>
__global__ void __launch_bounds__(Layout::kBlockThreads, 256 / Layout::kBlockThreads)
layer_norm_backward(const T* __restrict__ d_normed, const T* __restrict__ d_total, const T* __restrict__ total,
                    const float* __restrict__ mean, const float* __restrict__ rstd, const T* __restrict__ weight,
                    const int* __restrict__ row_keys, const Dropout dropout, T* __restrict__ d_residual, T* __restrict__ d_x,
                    float* __restrict__ partials, int num_sums, int rows, int width) {
  OPT_DS_SHARED_MEMORY(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  float sum_weight[Layout::kChunks][8], sum_bias[Layout::kChunks][8], sum_x[Layout::kChunks][8];
#pragma unroll
  for (int chunk = 0; chunk < Layout::kChunks; ++chunk)
#pragma unroll
    for (int i = 0; i < 8; ++i) sum_weight[chunk][i] = sum_bias[chunk][i] = sum_x[chunk][i] = 0.f;

  int buffer = 0;  // of two: a fast warp may write the next row's sums while a slow one still reads this row's
  for (int row = blockIdx.x * Layout::kRowsPerBlock + Layout::row_in_block(); row < rows;
       row += gridDim.x * Layout::kRowsPerBlock, buffer ^= 1) {
    const size_t begin = (size_t)row * width;
    const float mu = mean[row], inverse_deviation = rstd[row];
    float g[Layout::kChunks][8], xhat[Layout::kChunks][8], sum_g = 0.f, sum_gx = 0.f;
#pragma unroll
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
      const int column = Layout::column(chunk);
      if (column >= width) continue;
      float d[8], w[8];
      load8(d_normed + begin + column, d);
      load8(total + begin + column, xhat[chunk]);
      load8(weight + column, w);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        xhat[chunk][i] = (xhat[chunk][i] - mu) * inverse_deviation;
        g[chunk][i] = d[i] * w[i];
        sum_g += g[chunk][i];
        sum_gx += g[chunk][i] * xhat[chunk][i];
        sum_weight[chunk][i] += d[i] * xhat[chunk][i];
        sum_bias[chunk][i] += d[i];
      }
    }
    Layout::sum(sum_g, sum_gx, scratch + buffer * 2 * Layout::kWarpsPerRow);
    const float avg_g = sum_g / width, avg_gx = sum_gx / width;
#pragma unroll
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
      const int column = Layout::column(chunk);
      if (column >= width) continue;
      float d[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) d[i] = inverse_deviation * (g[chunk][i] - avg_g - xhat[chunk][i] * avg_gx);
      if (d_total) {
        float more[8];
        load8(d_total + begin + column, more);
#pragma unroll
        for (int i = 0; i < 8; ++i) d[i] += more[i];
      }
      store8(d_residual + begin + column, d);
      if (d_x) {
        const unsigned keep = keep8(dropout, row_keys + 2 * row, column);
#pragma unroll
        for (int i = 0; i < 8; ++i) d[i] = keep >> i & 1 ? d[i] * dropout.scale : 0.f;
        store8(d_x + begin + column, d);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) sum_x[chunk][i] += d[i];
    }
  }

  // [sum][block][width]. Where several warps share a block they pass their sums on through shared memory, in order; the last writes.
  float* passed = scratch + 32;  // [3][width]
#pragma unroll
  for (int turn = 0; turn < Layout::kRowsPerBlock; ++turn) {
    if (Layout::row_in_block() == turn) {
#pragma unroll
      for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
        const int column = Layout::column(chunk);
        if (column >= width) continue;
        auto pass_on = [&](float(&sum)[8], int which) {
          if (turn > 0) {
            float before[8];
            load8(passed + which * width + column, before);
#pragma unroll
            for (int i = 0; i < 8; ++i) sum[i] += before[i];
          }
          const bool last = turn == Layout::kRowsPerBlock - 1;
          store8(last ? partials + ((size_t)which * gridDim.x + blockIdx.x) * width + column : passed + which * width + column, sum);
        };
        pass_on(sum_weight[chunk], 0);
        pass_on(sum_bias[chunk], 1);
        if (num_sums == 3) pass_on(sum_x[chunk], 2);
      }
    }
    if (turn + 1 < Layout::kRowsPerBlock) __syncthreads();  // BARRIER pass_on
  }
}

// Adds the partial rows: a block of 32 x 8 threads owns 32 columns of one sum; thread row y takes parts y, y + 8, ..., and the
// eight sums are added in order.
template <class T>
__global__ void __launch_bounds__(256)
sum_partials(const float* __restrict__ partials, T* __restrict__ d_weight, T* __restrict__ d_bias, T* __restrict__ d_input_bias,
             int parts, int width) {
  OPT_DS_SHARED_MEMORY(shared);
  float* sums = reinterpret_cast<float*>(shared);  // [8][32]
  const int x = threadIdx.x % 32, y = threadIdx.x / 32, column = blockIdx.x * 32 + x;
  const float* mine = partials + (size_t)blockIdx.y * parts * width;
  T* output = blockIdx.y == 0 ? d_weight : blockIdx.y == 1 ? d_bias : d_input_bias;
  float sum = 0.f;
  if (column < width)
    for (int part = y; part < parts; part += 8) sum += mine[(size_t)part * width + column];
  sums[32 * y + x] = sum;
  __syncthreads();  // BARRIER partials
  if (y == 0 && column < width) {
    sum = 0.f;
#pragma unroll
    for (int w = 0; w < 8; ++w) sum += sums[32 * w + x];
    output[column] = from_float<T>(sum);
  }
}

// Any width and alignment: a block iterates over rows, element by element, and its threads add up their own columns in the partial
// row itself (a thread always has the same columns).
template <class T>
__global__ void __launch_bounds__(256)
layer_norm_backward_any(const T* __restrict__ d_normed, const T* __restrict__ d_total, const T* __restrict__ total,
                        const float* __restrict__ mean, const float* __restrict__ rstd, const T* __restrict__ weight,
                        const int* __restrict__ row_keys, const Dropout dropout, T* __restrict__ d_residual, T* __restrict__ d_x,
                        float* __restrict__ partials, int num_sums, int rows, int width) {
  using Layout = RowLayout<256, 1>;
  OPT_DS_SHARED_MEMORY(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  float* sum_weight = partials + (size_t)blockIdx.x * width;
  float* sum_bias = sum_weight + (size_t)gridDim.x * width;
  float* sum_x = sum_bias + (size_t)gridDim.x * width;
  for (int column = threadIdx.x; column < width; column += 256) {
    sum_weight[column] = sum_bias[column] = 0.f;
    if (num_sums == 3) sum_x[column] = 0.f;
  }
  int buffer = 0;
  for (int row = blockIdx.x; row < rows; row += gridDim.x, buffer ^= 1) {
    const size_t begin = (size_t)row * width;
    const float mu = mean[row], inverse_deviation = rstd[row];
    float sum_g = 0.f, sum_gx = 0.f;
    for (int column = threadIdx.x; column < width; column += 256) {
      const float d = to_float(d_normed[begin + column]), g = d * to_float(weight[column]);
      const float xhat = (to_float(total[begin + column]) - mu) * inverse_deviation;
      sum_g += g;
      sum_gx += g * xhat;
      sum_weight[column] += d * xhat;
      sum_bias[column] += d;
    }
    Layout::sum(sum_g, sum_gx, scratch + buffer * 2 * Layout::kWarpsPerRow);
    for (int column = threadIdx.x; column < width; column += 256) {
      const float g = to_float(d_normed[begin + column]) * to_float(weight[column]);
      const float xhat = (to_float(total[begin + column]) - mu) * inverse_deviation;
      float d = inverse_deviation * (g - sum_g / width - xhat * (sum_gx / width));
      if (d_total) d += to_float(d_total[begin + column]);
      d_residual[begin + column] = from_float<T>(d);
      if (d_x) {
        d = keep8(dropout, row_keys + 2 * row, column) & 1 ? d * dropout.scale : 0.f;
        d_x[begin + column] = from_float<T>(d);
      }
      if (num_sums == 3) sum_x[column] += d;
    }
  }
}

}  // namespace opt_ds

#ifndef __CUDACC_RTC__
namespace {

// Two blocks on every multiprocessor: the number of partial rows, and with it the order of the sums, depends on the GPU model.
int num_blocks(int rows, int rows_per_block) {
  const int wanted = (rows + rows_per_block - 1) / rows_per_block, most = 2 * opt_ds::num_multiprocessors();
  return wanted < most ? wanted : most;
}

}  // namespace

extern "C" int opt_ds_layer_norm_parts(int rows, int width) {
  return num_blocks(rows, width % 8 == 0 && width <= opt_ds::kNarrowWidth ? 4 : 1);
}

extern "C" int opt_ds_layer_norm_backward(const OptDsLayerNormBackward* a, void* stream) {
  using namespace opt_ds;
  const Dropout dropout = make_dropout(a->dropout);
  const int* row_keys = a->dropout.probability > 0 ? a->row_keys : nullptr;
  const bool aligned = aligned16(a->d_normed) && aligned16(a->d_total) && aligned16(a->total) && aligned16(a->weight) &&
                       aligned16(a->d_residual) && aligned16(a->d_x);
  return with_type(a->type, [&](auto element) {
    using T = decltype(element);
    const T *d_normed = (const T*)a->d_normed, *d_total = (const T*)a->d_total, *total = (const T*)a->total;
    const T* weight = (const T*)a->weight;
    T *d_residual = (T*)a->d_residual, *d_x = (T*)a->d_x;
    T *d_weight = (T*)a->d_weight, *d_bias = (T*)a->d_bias, *d_input_bias = (T*)a->d_input_bias;
    const float *mean = a->mean, *rstd = a->rstd;
    float* partials = a->partials;
    const int rows = a->rows, width = a->width, num_sums = a->d_input_bias ? 3 : 2;
    const int parts = a->parts;
    if (parts) {
      if (width % 8 || width > kWideWidth || !aligned) {
        OPT_DS_LAUNCH(layer_norm_backward_any<T>, parts, 256, 128, stream, d_normed, d_total, total, mean, rstd, weight, row_keys,
                      dropout, d_residual, d_x, partials, num_sums, rows, width);
      } else {
        with_row_layout(width, [&](auto layout) {
          using Layout = decltype(layout);
          const int shared_bytes = 128 + (Layout::kRowsPerBlock > 1 ? 3 * width * (int)sizeof(float) : 0);
          OPT_DS_LAUNCH((layer_norm_backward<T, Layout>), parts, Layout::kBlockThreads, shared_bytes, stream, d_normed, d_total, total,
                        mean, rstd, weight, row_keys, dropout, d_residual, d_x, partials, num_sums, rows, width);
        });
      }
    }
    OPT_DS_LAUNCH(sum_partials<T>, dim3((width + 31) / 32, num_sums), 256, 1024, stream, partials, d_weight, d_bias, d_input_bias,
                  parts, width);
    return last_error();
  });
}
#endif

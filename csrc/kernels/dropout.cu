// Dropout alone, over rows that have a key each (after an embedding's LayerNorm). Its own gradient: dropout(dy) with the same key.
// A warp handles one row at a time, each thread eight columns.
#include "opt_ds/row_layout.h"

namespace opt_ds {

template <class T>
__global__ void __launch_bounds__(256)
dropout_rows(const T* __restrict__ x, const int* __restrict__ row_keys, const Dropout dropout, T* __restrict__ y, int rows, int width,
             bool whole_chunks) {
  const int row = blockIdx.x * 8 + threadIdx.x / kWarp;
  if (row >= rows) return;
  const size_t begin = (size_t)row * width;
  for (int column = threadIdx.x % kWarp * 8; column < width; column += kWarp * 8) {
    const unsigned keep = keep8(dropout, row_keys + 2 * row, column);
    if (whole_chunks) {
      float v[8];
      load8(x + begin + column, v);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = keep >> i & 1 ? v[i] * dropout.scale : 0.f;
      store8(y + begin + column, v);
    } else {
      for (int i = 0; i < 8 && column + i < width; ++i)
        y[begin + column + i] = from_float<T>(keep >> i & 1 ? to_float(x[begin + column + i]) * dropout.scale : 0.f);
    }
  }
}

}  // namespace opt_ds

#ifndef __CUDACC_RTC__
extern "C" int opt_ds_dropout_rows(const OptDsDropoutRows* a, void* stream) {
  using namespace opt_ds;
  if (a->rows == 0) return 0;
  const Dropout dropout = make_dropout(a->dropout);
  const bool whole_chunks = a->width % 8 == 0 && aligned16(a->x) && aligned16(a->y);
  return with_type(a->type, [&](auto element) {
    using T = decltype(element);
    const T* x = (const T*)a->x;
    T* y = (T*)a->y;
    const int* row_keys = a->row_keys;
    const int rows = a->rows, width = a->width;
    OPT_DS_LAUNCH(dropout_rows<T>, (rows + 7) / 8, 256, 0, stream, x, row_keys, dropout, y, rows, width, whole_chunks);
    return last_error();
  });
}
#endif

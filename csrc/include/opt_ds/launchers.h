// The kernels' interface: plain C, raw pointers, sizes and a stream, so that binding.cpp needs no CUDA header, a kernel file needs
// no torch header, and the emulator offers the very same functions.
//
// Every launcher returns 0 or a CUDA error number (`opt_ds_error_name`), or -1 for a shape or type that it has no kernel for.
// Pointers are to device memory, 16-byte aligned where a "fast" condition is named. No launcher allocates or synchronises.
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

enum OptDsType { kOptDsFloat32 = 0, kOptDsFloat16 = 1, kOptDsBFloat16 = 2 };

// Dropout of a launch; probability 0: none. See opt_ds/dropout.h for what the fields mean.
struct OptDsDropout {
  double probability;
  unsigned long long key;
  unsigned layer_id;
};

// total = residual + dropout(x + input_bias); normed = (total - mean) / sqrt(variance + eps) * weight + bias.
struct OptDsLayerNormForward {
  int type;               // OptDsType of x, residual, the weights and outputs
  int rows, width;        // fast: width % 8 == 0 and width <= 8192
  const void* x;          // [rows, width]
  const void* input_bias; // [width], or null
  const void* residual;   // [rows, width], or null
  const int* row_keys;    // [rows, 2] (sample, position), needed by dropout
  const void *weight, *bias;  // [width]
  float eps;
  struct OptDsDropout dropout;
  void* total;            // [rows, width], or null where it would equal x
  void* normed;           // [rows, width]
  float *mean, *rstd;     // [rows]
};
int opt_ds_layer_norm_forward(const struct OptDsLayerNormForward* arguments, void* stream);

// Gradients of the above. The sums over rows are made in two stages, in an order that depends on `parts` and not on timing.
struct OptDsLayerNormBackward {
  int type, rows, width;
  const void* d_normed;   // [rows, width]
  const void* d_total;    // [rows, width], or null
  const void* total;      // [rows, width]
  const float *mean, *rstd;
  const void* weight;
  const int* row_keys;
  struct OptDsDropout dropout;
  void* d_residual;       // [rows, width]: the gradient of total
  void* d_x;              // [rows, width]: the same after dropout; null without dropout
  float* partials;        // workspace [3, parts, width]
  int parts;              // opt_ds_layer_norm_parts(rows, width)
  void *d_weight, *d_bias;  // [width]
  void* d_input_bias;     // [width], or null
};
int opt_ds_layer_norm_backward(const struct OptDsLayerNormBackward* arguments, void* stream);
int opt_ds_layer_norm_parts(int rows, int width);

// y = dropout(x), rows as above; also its own gradient.
struct OptDsDropoutRows {
  int type, rows, width;
  const void* x;
  const int* row_keys;
  struct OptDsDropout dropout;
  void* y;
};
int opt_ds_dropout_rows(const struct OptDsDropoutRows* arguments, void* stream);

// out = dropout(softmax(scale * q k^T)) v within each pair of sequences. All of q, k, v, out: [rows, heads, head_size], the last two
// dimensions contiguous; `*_stride`: elements from row to row. Tensor cores: fp16 (bf16 from sm_80 on), head_size 32, 64 or 128,
// pointers and strides of 16 bytes; everything else up to head_size 256 takes the plain kernel.
struct OptDsAttention {
  int type, num_sequences, num_heads, head_size;
  int total_queries, total_keys, max_queries, max_keys;
  const int *cu_queries, *cu_keys;  // [num_sequences + 1], first row of each sequence
  const int* sample_index;          // [num_sequences], needed by dropout
  float scale;
  int causal;                       // 1: a query sees keys up to its own place (the sequences must be equally long)
  struct OptDsDropout dropout;
  const void *q, *k, *v;
  long long q_stride, k_stride, v_stride;
  void* out;                        // [total_queries, heads, head_size], contiguous; 0 for a query without keys
  float* lse;                       // [heads, total_queries], natural logarithm of the softmax's denominator
};
int opt_ds_attention_forward(const struct OptDsAttention* arguments, void* stream);

// Deterministic: one kernel for dq, one for dk and dv, no atomics. `delta`: workspace [heads, total_queries].
struct OptDsAttentionBackward {
  struct OptDsAttention forward;
  const void* d_out;                // contiguous
  float* delta;
  void *d_q, *d_k, *d_v;            // contiguous
};
int opt_ds_attention_backward(const struct OptDsAttentionBackward* arguments, void* stream);

const char* opt_ds_error_name(int error);
const char* opt_ds_architectures(void);  // "sm_70 sm_80", or "emulator sm_70"

#ifdef __cplusplus
}
#endif

// The kernels as torch operators: checks shapes, allocates outputs, hands raw pointers to a launcher. Compiled twice from here:
//     opt_ds           CUDA key: the kernels as nvcc compiled them (only with OPT_DS_WITH_CUDA); CPU key: csrc/reference.cpp
//     opt_ds_emulator  CPU key: the same kernel sources as g++ compiled them for the emulator
// Without any CUDA header (the stream comes from c10's virtual guard), so it builds in seconds and against any torch.
// autograd.cpp has the operators' gradients, opt_ds/ops/compiled.py their shapes for torch.compile.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include "opt_ds/launchers.h"

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

#ifndef OPT_DS_LIBRARY
#define OPT_DS_LIBRARY opt_ds
#define OPT_DS_DEFINES_REFERENCE
#endif

constexpr const char* kLayerNorm =
    "layer_norm(Tensor x, Tensor? input_bias, Tensor? residual, Tensor weight, Tensor bias, float eps, Tensor? row_keys, "
    "float dropout, int key, int layer_id) -> (Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kLayerNormBackward =
    "layer_norm_backward(Tensor d_normed, Tensor? d_total, Tensor total, Tensor mean, Tensor rstd, Tensor weight, Tensor? row_keys, "
    "float dropout, int key, int layer_id, bool with_input_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kDropout = "dropout(Tensor x, Tensor row_keys, float dropout, int key, int layer_id) -> Tensor";
constexpr const char* kAttention =
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_queries, Tensor cu_keys, int max_queries, int max_keys, float scale, "
    "bool causal, Tensor? sample_index, float dropout, int key, int layer_id) -> (Tensor, Tensor)";
constexpr const char* kAttentionBackward =
    "attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_queries, Tensor cu_keys, "
    "int max_queries, int max_keys, float scale, bool causal, Tensor? sample_index, float dropout, int key, int layer_id) "
    "-> (Tensor, Tensor, Tensor)";

#if defined(OPT_DS_WITH_CUDA) || !defined(OPT_DS_DEFINES_REFERENCE)

// Makes the tensor's device current and knows its stream (null on the CPU).
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.device()) {
    if (tensor.is_cuda())
      stream_ = c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(tensor.device()).native_handle();
  }
  void* stream() const { return stream_; }
  void check(int error, const char* op) const {
    TORCH_CHECK(error == 0, "opt_ds::", op, ": ", opt_ds_error_name(error), " (this build: ", opt_ds_architectures(), ")");
  }

 private:
  c10::DeviceGuard guard_;
  void* stream_ = nullptr;
};

int type_of(const Tensor& x) {
  if (x.scalar_type() == at::kFloat) return kOptDsFloat32;
  if (x.scalar_type() == at::kHalf) return kOptDsFloat16;
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "opt_ds kernels take float32, float16 and bfloat16, not ", x.scalar_type());
  return kOptDsBFloat16;
}

const void* pointer(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }

OptionalTensor contiguous(const OptionalTensor& x) { return x ? OptionalTensor(x->contiguous()) : x; }

OptDsDropout dropout_of(double probability, int64_t key, int64_t layer_id, const OptionalTensor& identity) {
  TORCH_CHECK(probability >= 0 && probability < 1, "dropout must be in [0, 1), found ", probability);
  TORCH_CHECK(probability == 0 || identity, "dropout needs to know which rows it acts on");
  TORCH_CHECK(!identity || identity->scalar_type() == at::kInt, "row keys and sample indices are int32");
  TORCH_CHECK(layer_id >= 0 && layer_id < 65536, "a dropout layer id is a number below 65536, found ", layer_id);
  return {probability, (unsigned long long)key, (unsigned)layer_id};
}

int rows_of(const Tensor& x) { return x.size(-1) ? (int)(x.numel() / x.size(-1)) : 0; }

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(const Tensor& x_, const OptionalTensor& input_bias_,
                                                      const OptionalTensor& residual_, const Tensor& weight, const Tensor& bias,
                                                      double eps, const OptionalTensor& row_keys, double probability, int64_t key,
                                                      int64_t layer_id) {
  const Launch launch(x_);
  const Tensor x = x_.contiguous();
  const OptionalTensor input_bias = contiguous(input_bias_), residual = contiguous(residual_);
  TORCH_CHECK(weight.scalar_type() == x.scalar_type() && bias.scalar_type() == x.scalar_type(), "layer_norm: x is ", x.scalar_type(),
              ", weight ", weight.scalar_type(), ", bias ", bias.scalar_type(), ": they must agree");
  TORCH_CHECK(weight.numel() == x.size(-1) && bias.numel() == x.size(-1), "layer_norm: weight and bias must have x's last size");
  TORCH_CHECK(!residual || (residual->sizes() == x.sizes() && residual->scalar_type() == x.scalar_type()),
              "layer_norm: residual must be like x");
  const bool has_total = input_bias || residual || probability > 0;
  Tensor normed = at::empty_like(x), total = has_total ? at::empty_like(x) : at::empty({0}, x.options());
  Tensor mean = at::empty({rows_of(x)}, x.options().dtype(at::kFloat)), rstd = at::empty_like(mean);
  const Tensor w = weight.contiguous(), b = bias.contiguous();
  OptDsLayerNormForward a{type_of(x), rows_of(x), (int)x.size(-1), x.const_data_ptr(), pointer(input_bias), pointer(residual),
                          (const int*)pointer(row_keys), w.const_data_ptr(), b.const_data_ptr(), (float)eps,
                          dropout_of(probability, key, layer_id, row_keys), has_total ? total.mutable_data_ptr() : nullptr,
                          normed.mutable_data_ptr(), mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>()};
  launch.check(opt_ds_layer_norm_forward(&a, launch.stream()), "layer_norm");
  return {normed, total, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& d_normed_, const OptionalTensor& d_total_, const Tensor& total_, const Tensor& mean, const Tensor& rstd,
    const Tensor& weight_, const OptionalTensor& row_keys, double probability, int64_t key, int64_t layer_id, bool with_input_bias) {
  const Launch launch(total_);
  const Tensor d_normed = d_normed_.contiguous(), total = total_.contiguous(), weight = weight_.contiguous();
  const OptionalTensor d_total = contiguous(d_total_);
  const int rows = rows_of(total), width = (int)total.size(-1), parts = opt_ds_layer_norm_parts(rows, width);
  Tensor d_residual = at::empty_like(total), d_x = probability > 0 ? at::empty_like(total) : at::empty({0}, total.options());
  Tensor d_weight = at::empty({width}, weight.options()), d_bias = at::empty_like(d_weight);
  Tensor d_input_bias = at::empty({with_input_bias ? width : 0}, weight.options());
  Tensor partials = at::empty({with_input_bias ? 3 : 2, parts, width}, mean.options());
  OptDsLayerNormBackward a{type_of(total), rows, width, d_normed.const_data_ptr(), pointer(d_total), total.const_data_ptr(),
                           mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(), weight.const_data_ptr(),
                           (const int*)pointer(row_keys), dropout_of(probability, key, layer_id, row_keys),
                           d_residual.mutable_data_ptr(), probability > 0 ? d_x.mutable_data_ptr() : nullptr,
                           partials.mutable_data_ptr<float>(), parts, d_weight.mutable_data_ptr(), d_bias.mutable_data_ptr(),
                           with_input_bias ? d_input_bias.mutable_data_ptr() : nullptr};
  launch.check(opt_ds_layer_norm_backward(&a, launch.stream()), "layer_norm_backward");
  return {d_residual, d_x, d_weight, d_bias, d_input_bias};
}

Tensor dropout(const Tensor& x_, const Tensor& row_keys, double probability, int64_t key, int64_t layer_id) {
  const Launch launch(x_);
  const Tensor x = x_.contiguous();
  Tensor y = at::empty_like(x);
  OptDsDropoutRows a{type_of(x), rows_of(x), (int)x.size(-1), x.const_data_ptr(), row_keys.const_data_ptr<int>(),
                     dropout_of(probability, key, layer_id, row_keys), y.mutable_data_ptr()};
  launch.check(opt_ds_dropout_rows(&a, launch.stream()), "dropout");
  return y;
}

// The last two dimensions contiguous; rows may be apart (a slice of a fused projection).
Tensor with_whole_rows(const Tensor& x) {
  return x.stride(2) == 1 && x.stride(1) == x.size(2) ? x : x.contiguous();
}

OptDsAttention attention_arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_queries, const Tensor& cu_keys,
                                   int64_t max_queries, int64_t max_keys, double scale, bool causal, const OptionalTensor& sample_index,
                                   double probability, int64_t key, int64_t layer_id, const void* out, const void* lse) {
  TORCH_CHECK(q.dim() == 3 && k.sizes() == v.sizes() && q.size(1) == k.size(1) && q.size(2) == k.size(2),
              "attention: q [t, heads, size], k and v [u, heads, size], found ", q.sizes(), ", ", k.sizes(), ", ", v.sizes());
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), "attention: q, k and v differ in type");
  TORCH_CHECK(cu_queries.scalar_type() == at::kInt && cu_keys.scalar_type() == at::kInt && cu_queries.numel() == cu_keys.numel(),
              "attention: cu_queries and cu_keys are int32 and equally long");
  return {type_of(q), (int)cu_queries.numel() - 1, (int)q.size(1), (int)q.size(2), (int)q.size(0), (int)k.size(0), (int)max_queries,
          (int)max_keys, cu_queries.const_data_ptr<int>(), cu_keys.const_data_ptr<int>(), (const int*)pointer(sample_index), (float)scale,
          causal, dropout_of(probability, key, layer_id, sample_index), q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(), q.stride(0),
          k.stride(0), v.stride(0), const_cast<void*>(out), static_cast<float*>(const_cast<void*>(lse))};
}

std::tuple<Tensor, Tensor> attention(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& cu_queries,
                                     const Tensor& cu_keys, int64_t max_queries, int64_t max_keys, double scale, bool causal,
                                     const OptionalTensor& sample_index, double probability, int64_t key, int64_t layer_id) {
  const Launch launch(q_);
  const Tensor q = with_whole_rows(q_), k = with_whole_rows(k_), v = with_whole_rows(v_);
  Tensor out = at::empty(q.sizes(), q.options()), lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
  const OptDsAttention a = attention_arguments(q, k, v, cu_queries, cu_keys, max_queries, max_keys, scale, causal, sample_index, probability,
                                               key, layer_id, out.mutable_data_ptr(), lse.mutable_data_ptr());
  launch.check(opt_ds_attention_forward(&a, launch.stream()), "attention");
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& d_out_, const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                                      const Tensor& out, const Tensor& lse, const Tensor& cu_queries,
                                                      const Tensor& cu_keys, int64_t max_queries, int64_t max_keys, double scale,
                                                      bool causal, const OptionalTensor& sample_index, double probability, int64_t key,
                                                      int64_t layer_id) {
  const Launch launch(q_);
  const Tensor d_out = d_out_.contiguous(), q = with_whole_rows(q_), k = with_whole_rows(k_), v = with_whole_rows(v_);
  Tensor d_q = at::empty(q.sizes(), q.options()), d_k = at::empty(k.sizes(), q.options()), d_v = at::empty_like(d_k);
  Tensor delta = at::empty_like(lse);
  OptDsAttentionBackward a{attention_arguments(q, k, v, cu_queries, cu_keys, max_queries, max_keys, scale, causal, sample_index, probability,
                                               key, layer_id, out.const_data_ptr(), lse.const_data_ptr()),
                           d_out.const_data_ptr(), delta.mutable_data_ptr<float>(), d_q.mutable_data_ptr(), d_k.mutable_data_ptr(),
                           d_v.mutable_data_ptr()};
  launch.check(opt_ds_attention_backward(&a, launch.stream()), "attention_backward");
  return {d_q, d_k, d_v};
}

void register_kernels(torch::Library& m) {
  m.impl("layer_norm", layer_norm);
  m.impl("layer_norm_backward", layer_norm_backward);
  m.impl("dropout", dropout);
  m.impl("attention", attention);
  m.impl("attention_backward", attention_backward);
}

#endif

}  // namespace

TORCH_LIBRARY(OPT_DS_LIBRARY, m) {
  for (const char* schema : {kLayerNorm, kLayerNormBackward, kDropout, kAttention, kAttentionBackward})
    m.def(schema, {at::Tag::pt2_compliant_tag});
}

#ifdef OPT_DS_WITH_CUDA
TORCH_LIBRARY_IMPL(opt_ds, CUDA, m) { register_kernels(m); }
#endif
#ifndef OPT_DS_DEFINES_REFERENCE
TORCH_LIBRARY_IMPL(OPT_DS_LIBRARY, CPU, m) { register_kernels(m); }
#endif

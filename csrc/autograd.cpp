// Gradients of the operators, for torch's autograd: what a forward pass keeps, and which backward operator takes it. In C++, since on
// a fast GPU the time between launches is what a step takes: registered from Python, an operator costs its launch several times over.
// Compiled once for each library (binding.cpp); calls go through the dispatcher, so that CUDA, CPU, emulator and torch.compile's
// shapes (opt_ds/ops/compiled.py) all share this.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#ifndef OPT_DS_LIBRARY
#define OPT_DS_LIBRARY opt_ds
#endif
#define OPT_DS_QUOTED_(name) #name
#define OPT_DS_QUOTED(name) OPT_DS_QUOTED_(name)
// The operator of this library, looked up once.
#define OPT_DS_OPERATOR(name, signature)                                                                \
  ([]() -> const c10::TypedOperatorHandle<signature>& {                                                 \
    static const auto handle =                                                                          \
        c10::Dispatcher::singleton().findSchemaOrThrow(OPT_DS_QUOTED(OPT_DS_LIBRARY) "::" name, "").typed<signature>(); \
    return handle;                                                                                      \
  }())

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using Tensors = torch::autograd::variable_list;

namespace {

using LayerNormOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using LayerNormSignature = LayerNormOutputs(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                            double, const OptionalTensor&, double, int64_t, int64_t);
using LayerNormBackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double,
    int64_t, int64_t, bool);
using DropoutSignature = Tensor(const Tensor&, const Tensor&, double, int64_t, int64_t);
using AttentionSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                                                      int64_t, double, bool, const OptionalTensor&, double, int64_t, int64_t);
using AttentionBackwardSignature = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
    int64_t, double, bool, const OptionalTensor&, double, int64_t, int64_t);

// A tensor that may be missing, as autograd keeps and hands it over: undefined.
OptionalTensor optional(const Tensor& x) { return x.defined() ? OptionalTensor(x) : OptionalTensor(); }
Tensor defined_or_not(const OptionalTensor& x) { return x ? *x : Tensor(); }

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static Tensors forward(AutogradContext* context, const Tensor& x, const OptionalTensor& input_bias, const OptionalTensor& residual,
                         const Tensor& weight, const Tensor& bias, double eps, const OptionalTensor& row_keys, double dropout,
                         int64_t key, int64_t layer_id) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [normed, total, mean, rstd] = OPT_DS_OPERATOR("layer_norm", LayerNormSignature)
                                                 .call(x, input_bias, residual, weight, bias, eps, row_keys, dropout, key, layer_id);
    const bool has_total = input_bias || residual || dropout > 0;  // else it is x, and the operator gives an empty one
    context->save_for_backward({has_total ? total : x, mean, rstd, weight, defined_or_not(row_keys)});
    context->saved_data["dropout"] = dropout;
    context->saved_data["key"] = key;
    context->saved_data["layer_id"] = layer_id;
    context->saved_data["has"] = int64_t(has_total) | int64_t(input_bias.has_value()) << 1 | int64_t(residual.has_value()) << 2;
    context->mark_non_differentiable({mean, rstd});
    context->set_materialize_grads(false);
    return {normed, total, mean, rstd};
  }

  static Tensors backward(AutogradContext* context, const Tensors& gradients) {
    const auto saved = context->get_saved_variables();
    const Tensor &total = saved[0], &mean = saved[1], &rstd = saved[2], &weight = saved[3];
    const double dropout = context->saved_data["dropout"].toDouble();
    const int64_t has = context->saved_data["has"].toInt();
    const bool has_total = has & 1, has_input_bias = has & 2, has_residual = has & 4;
    const Tensor d_normed = gradients[0].defined() ? gradients[0] : at::zeros_like(total);
    const OptionalTensor d_total = has_total ? optional(gradients[1]) : OptionalTensor();
    const auto [d_residual, d_x, d_weight, d_bias, d_input_bias] =
        OPT_DS_OPERATOR("layer_norm_backward", LayerNormBackwardSignature)
            .call(d_normed, d_total, total, mean, rstd, weight, optional(saved[4]), dropout, context->saved_data["key"].toInt(),
                  context->saved_data["layer_id"].toInt(), has_input_bias);
    const Tensor none;
    return {dropout > 0 ? d_x : d_residual, has_input_bias ? d_input_bias : none, has_residual ? d_residual : none, d_weight, d_bias,
            none, none, none, none, none};
  }
};

struct Dropout : torch::autograd::Function<Dropout> {
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& row_keys, double dropout, int64_t key, int64_t layer_id) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({row_keys});
    context->saved_data["dropout"] = dropout;
    context->saved_data["key"] = key;
    context->saved_data["layer_id"] = layer_id;
    return OPT_DS_OPERATOR("dropout", DropoutSignature).call(x, row_keys, dropout, key, layer_id);
  }

  static Tensors backward(AutogradContext* context, const Tensors& gradients) {
    auto& how = context->saved_data;
    return {OPT_DS_OPERATOR("dropout", DropoutSignature)
                .call(gradients[0], context->get_saved_variables()[0], how["dropout"].toDouble(), how["key"].toInt(),
                      how["layer_id"].toInt()),
            Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct Attention : torch::autograd::Function<Attention> {
  static Tensors forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_queries,
                         const Tensor& cu_keys, int64_t max_queries, int64_t max_keys, double scale, bool causal,
                         const OptionalTensor& sample_index, double dropout, int64_t key, int64_t layer_id) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [out, lse] = OPT_DS_OPERATOR("attention", AttentionSignature)
                                .call(q, k, v, cu_queries, cu_keys, max_queries, max_keys, scale, causal, sample_index, dropout, key, layer_id);
    context->save_for_backward({q, k, v, out, lse, cu_queries, cu_keys, defined_or_not(sample_index)});
    context->saved_data["max_queries"] = max_queries;
    context->saved_data["max_keys"] = max_keys;
    context->saved_data["scale"] = scale;
    context->saved_data["causal"] = causal;
    context->saved_data["dropout"] = dropout;
    context->saved_data["key"] = key;
    context->saved_data["layer_id"] = layer_id;
    context->mark_non_differentiable({lse});
    context->set_materialize_grads(false);
    return {out, lse};
  }

  static Tensors backward(AutogradContext* context, const Tensors& gradients) {
    Tensors found(13);  // as many as forward takes
    if (!gradients[0].defined()) return found;
    const auto saved = context->get_saved_variables();
    auto& how = context->saved_data;
    std::tie(found[0], found[1], found[2]) =
        OPT_DS_OPERATOR("attention_backward", AttentionBackwardSignature)
            .call(gradients[0], saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], how["max_queries"].toInt(),
                  how["max_keys"].toInt(), how["scale"].toDouble(), how["causal"].toBool(), optional(saved[7]),
                  how["dropout"].toDouble(), how["key"].toInt(), how["layer_id"].toInt());
    return found;
  }
};

LayerNormOutputs layer_norm(const Tensor& x, const OptionalTensor& input_bias, const OptionalTensor& residual, const Tensor& weight,
                            const Tensor& bias, double eps, const OptionalTensor& row_keys, double dropout, int64_t key, int64_t layer_id) {
  const Tensors found = LayerNorm::apply(x, input_bias, residual, weight, bias, eps, row_keys, dropout, key, layer_id);
  return {found[0], found[1], found[2], found[3]};
}

Tensor dropout(const Tensor& x, const Tensor& row_keys, double probability, int64_t key, int64_t layer_id) {
  return Dropout::apply(x, row_keys, probability, key, layer_id);
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_queries, const Tensor& cu_keys,
                                     int64_t max_queries, int64_t max_keys, double scale, bool causal, const OptionalTensor& sample_index,
                                     double probability, int64_t key, int64_t layer_id) {
  const Tensors found = Attention::apply(q, k, v, cu_queries, cu_keys, max_queries, max_keys, scale, causal, sample_index, probability, key,
                                         layer_id);
  return {found[0], found[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(OPT_DS_LIBRARY, Autograd, m) {
  m.impl("layer_norm", layer_norm);
  m.impl("dropout", dropout);
  m.impl("attention", attention);
}

// The operators in plain ATen, as their CPU key: what the kernels are measured against, in any floating type (float64 for gradcheck).
// Written for comparison with the formulas in csrc/kernels, not for speed; the dropout masks are the kernels' bits.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <limits>

#include "opt_ds/dropout.h"

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

// fp32 for 16-bit types, as the kernels compute.
at::ScalarType wide(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// 0 or 1 / (1 - p) for each element of rows [rows, width] with keys [rows, 2] (sample, position).
Tensor row_mask(const Tensor& row_keys, int64_t rows, int64_t width, double probability, int64_t key, int64_t layer_id, at::ScalarType type) {
  TORCH_CHECK(row_keys.scalar_type() == at::kInt && row_keys.numel() == 2 * rows, "row keys are int32 [rows, 2]");
  const opt_ds::Dropout dropout = opt_ds::make_dropout(probability, (unsigned long long)key, (unsigned)layer_id);
  Tensor mask = at::empty({rows, width}, at::kFloat);
  const Tensor keys = row_keys.contiguous();
  const int* key_of = keys.const_data_ptr<int>();
  float* out = mask.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t column = 0; column < width; column += 32) {
        const unsigned keep = keep_word(dropout, (unsigned)column / 32, key_of[2 * row + 1], key_of[2 * row], 0);
        for (int64_t j = 0; j < 32 && column + j < width; ++j) out[row * width + column + j] = keep >> j & 1 ? dropout.scale : 0.f;
      }
  });
  return mask.to(type);
}

// The same for the probabilities of one sequence: [heads, queries, keys].
Tensor probability_mask(int64_t heads, int64_t queries, int64_t keys, int sample, double probability, int64_t key, int64_t layer_id,
                        at::ScalarType type) {
  const opt_ds::Dropout dropout = opt_ds::make_dropout(probability, (unsigned long long)key, (unsigned)layer_id);
  Tensor mask = at::empty({heads, queries, keys}, at::kFloat);
  float* out = mask.mutable_data_ptr<float>();
  at::parallel_for(0, heads * queries, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t column = 0; column < keys; column += 32) {
        const unsigned keep =
            keep_word(dropout, (unsigned)column / 32, (unsigned)(row % queries), (unsigned)sample, (unsigned)(row / queries));
        for (int64_t j = 0; j < 32 && column + j < keys; ++j) out[row * keys + column + j] = keep >> j & 1 ? dropout.scale : 0.f;
      }
  });
  return mask.to(type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const OptionalTensor& input_bias, const OptionalTensor& residual,
                                                      const Tensor& weight, const Tensor& bias, double eps,
                                                      const OptionalTensor& row_keys, double probability, int64_t key, int64_t layer_id) {
  const int64_t width = x.size(-1), rows = x.numel() / std::max<int64_t>(width, 1);
  const bool has_total = input_bias || residual || probability > 0;
  Tensor total = x;
  if (has_total) {
    if (input_bias) total = total + *input_bias;  // in x's type, as a linear layer rounds its output
    total = total.to(wide(x));
    if (probability > 0) total = total * row_mask(row_keys.value(), rows, width, probability, key, layer_id, wide(x)).view(x.sizes());
    if (residual) total = total + *residual;
    total = total.to(x.scalar_type()).contiguous();
  }
  const Tensor t = total.to(wide(x)).reshape({rows, width});
  const Tensor mean = t.mean(-1), rstd = at::rsqrt((t - mean.unsqueeze(1)).square().mean(-1) + eps);
  const Tensor xhat = (t - mean.unsqueeze(1)) * rstd.unsqueeze(1);
  const Tensor normed = (xhat * weight.to(wide(x)) + bias.to(wide(x))).to(x.scalar_type()).view(x.sizes());
  return {normed, has_total ? total : at::empty({0}, x.options()), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& d_normed, const OptionalTensor& d_total, const Tensor& total, const Tensor& mean, const Tensor& rstd,
    const Tensor& weight, const OptionalTensor& row_keys, double probability, int64_t key, int64_t layer_id, bool with_input_bias) {
  const auto type = total.scalar_type();
  const int64_t width = total.size(-1), rows = total.numel() / std::max<int64_t>(width, 1);
  auto rows_of = [&](const Tensor& x) { return x.to(wide(total)).reshape({rows, width}); };
  const Tensor d = rows_of(d_normed), xhat = (rows_of(total) - mean.unsqueeze(1)) * rstd.unsqueeze(1), g = d * weight.to(wide(total));
  Tensor gradient = rstd.unsqueeze(1) * (g - g.mean(-1, true) - xhat * (g * xhat).mean(-1, true));
  if (d_total) gradient = gradient + rows_of(*d_total);
  Tensor d_x = gradient;
  if (probability > 0) d_x = d_x * row_mask(row_keys.value(), rows, width, probability, key, layer_id, wide(total));
  auto stored = [&](const Tensor& x) { return x.to(type).view(total.sizes()); };
  return {stored(gradient), probability > 0 ? stored(d_x) : at::empty({0}, total.options()), (d * xhat).sum(0).to(weight.scalar_type()),
          d.sum(0).to(weight.scalar_type()),
          with_input_bias ? d_x.sum(0).to(weight.scalar_type()) : at::empty({0}, weight.options())};
}

Tensor dropout(const Tensor& x, const Tensor& row_keys, double probability, int64_t key, int64_t layer_id) {
  const int64_t width = x.size(-1), rows = x.numel() / std::max<int64_t>(width, 1);
  return (x.to(wide(x)) * row_mask(row_keys, rows, width, probability, key, layer_id, wide(x)).view(x.sizes())).to(x.scalar_type());
}

// What one sequence of a batch is: its rows as [heads, rows, size], and its mask.
struct OneSequence {
  int64_t first_query, num_queries, first_key, num_keys;
  Tensor mask;  // [heads, queries, keys], or undefined

  OneSequence(const Tensor& q, const Tensor& cu_queries, const Tensor& cu_keys, int64_t s, const OptionalTensor& sample_index,
              double probability, int64_t key, int64_t layer_id) {
    const int *begin_q = cu_queries.const_data_ptr<int>(), *begin_k = cu_keys.const_data_ptr<int>();
    first_query = begin_q[s], num_queries = begin_q[s + 1] - first_query;
    first_key = begin_k[s], num_keys = begin_k[s + 1] - first_key;
    if (probability > 0)
      mask = probability_mask(q.size(1), num_queries, num_keys, sample_index.value().const_data_ptr<int>()[s], probability, key, layer_id, wide(q));
  }
  Tensor queries(const Tensor& x) const { return rows(x, first_query, num_queries); }
  Tensor keys(const Tensor& x) const { return rows(x, first_key, num_keys); }
  static Tensor rows(const Tensor& x, int64_t first, int64_t count) { return x.narrow(0, first, count).transpose(0, 1).to(wide(x)); }

  Tensor scores(const Tensor& q, const Tensor& k, double scale, bool causal) const {
    Tensor scores = at::matmul(queries(q), keys(k).transpose(1, 2)) * scale;
    if (causal) {
      const Tensor later = at::ones({num_queries, num_keys}, scores.options().dtype(at::kBool)).triu(1);
      scores = scores.masked_fill(later, -std::numeric_limits<double>::infinity());
    }
    return scores;
  }
};

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_queries, const Tensor& cu_keys,
                                     int64_t, int64_t, double scale, bool causal, const OptionalTensor& sample_index, double probability,
                                     int64_t key, int64_t layer_id) {
  Tensor out = at::zeros(q.sizes(), q.options());
  Tensor lse = at::full({q.size(1), q.size(0)}, -std::numeric_limits<double>::infinity(), q.options().dtype(wide(q)));
  for (int64_t s = 0; s + 1 < cu_queries.numel(); ++s) {
    const OneSequence one(q, cu_queries, cu_keys, s, sample_index, probability, key, layer_id);
    if (!one.num_queries || !one.num_keys) continue;
    const Tensor scores = one.scores(q, k, scale, causal);
    lse.narrow(1, one.first_query, one.num_queries).copy_(at::logsumexp(scores, -1));
    Tensor p = at::softmax(scores, -1);
    if (one.mask.defined()) p = p * one.mask;
    out.narrow(0, one.first_query, one.num_queries).copy_(at::matmul(p, one.keys(v)).transpose(0, 1));
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                                      const Tensor& out, const Tensor& lse, const Tensor& cu_queries,
                                                      const Tensor& cu_keys, int64_t, int64_t, double scale, bool causal,
                                                      const OptionalTensor& sample_index, double probability, int64_t key, int64_t layer_id) {
  Tensor d_q = at::zeros(q.sizes(), q.options()), d_k = at::zeros(k.sizes(), k.options()), d_v = at::zeros(v.sizes(), v.options());
  for (int64_t s = 0; s + 1 < cu_queries.numel(); ++s) {
    const OneSequence one(q, cu_queries, cu_keys, s, sample_index, probability, key, layer_id);
    if (!one.num_queries || !one.num_keys) continue;
    const Tensor own_lse = lse.narrow(1, one.first_query, one.num_queries).unsqueeze(-1);
    const Tensor p = at::exp(one.scores(q, k, scale, causal) - own_lse), g = one.queries(d_out);
    const Tensor delta = (g * one.queries(out)).sum(-1, true);
    Tensor d_p = at::matmul(g, one.keys(v).transpose(1, 2)), kept = p;
    if (one.mask.defined()) d_p = d_p * one.mask, kept = p * one.mask;
    const Tensor d_s = p * (d_p - delta) * scale;
    d_q.narrow(0, one.first_query, one.num_queries).copy_(at::matmul(d_s, one.keys(k)).transpose(0, 1));
    d_k.narrow(0, one.first_key, one.num_keys).copy_(at::matmul(d_s.transpose(1, 2), one.queries(q)).transpose(0, 1));
    d_v.narrow(0, one.first_key, one.num_keys).copy_(at::matmul(kept.transpose(1, 2), g).transpose(0, 1));
  }
  return {d_q, d_k, d_v};
}

}  // namespace

TORCH_LIBRARY_IMPL(opt_ds, CPU, m) {
  m.impl("layer_norm", layer_norm);
  m.impl("layer_norm_backward", layer_norm_backward);
  m.impl("dropout", dropout);
  m.impl("attention", attention);
  m.impl("attention_backward", attention_backward);
}

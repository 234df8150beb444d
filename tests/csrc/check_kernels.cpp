// Every kernel against a float64 computation, through the emulator; what the sanitizer builds and the seeded bugs run.
//     check_kernels layer_norm|attention|all quick|full
// Outputs start as NaN, so an element that is never written fails. Every gradient is computed twice and must have the same bits.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "opt_ds/dropout.h"
#include "opt_ds/launch.h"

using namespace opt_ds;

namespace {

int num_failures = 0;
std::mt19937 generator(5);

template <class T> int type_of();
template <> int type_of<float>() { return kOptDsFloat32; }
template <> int type_of<half>() { return kOptDsFloat16; }
template <> int type_of<bfloat16>() { return kOptDsBFloat16; }
template <class T> const char* name_of() { return std::is_same_v<T, float> ? "fp32" : std::is_same_v<T, half> ? "fp16" : "bf16"; }
// Rounding of the stored results, and of the 16-bit operands between the products of attention.
template <class T> double rounding() { return std::is_same_v<T, float> ? 1e-6 : std::is_same_v<T, half> ? 1. / 2048 : 1. / 256; }

// A buffer of exactly its size on the heap, so that AddressSanitizer sees one step too far.
template <class T>
struct Buffer {
  std::vector<T> data;
  explicit Buffer(size_t n) : data(n, from_float<T>(NAN)) {}
  Buffer(size_t n, double mean, double deviation) : data(n) {
    std::normal_distribution<float> normal((float)mean, (float)deviation);
    for (T& x : data) x = from_float<T>(normal(generator));
  }
  double operator[](size_t i) const { return to_float(data[i]); }
  T* pointer() { return data.data(); }
};

// Largest error relative to max(floor, largest true value).
template <class T>
double error(const Buffer<T>& found, const std::vector<double>& truth, double floor = 1) {
  double largest = floor, worst = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    largest = std::max(largest, std::abs(truth[i]));
    const double e = std::abs(found[i] - truth[i]);
    if (!(e <= worst)) worst = e;  // keeps a NaN
  }
  return worst == 0 ? 0 : worst / largest;  // where all that should be 0 is 0
}

template <class T>
bool same(Buffer<T>& a, Buffer<T>& b) {
  return a.data.empty() || !memcmp(a.pointer(), b.pointer(), a.data.size() * sizeof(T));
}

void report(const std::string& what, const std::vector<double>& errors, double allowed, bool reproduced) {
  bool ok = reproduced;
  printf("%s:", what.c_str());
  for (double e : errors) {
    printf(" %.1e", e);
    ok &= e <= allowed;
  }
  printf(" (allowed %.1e)%s %s\n", allowed, reproduced ? "" : " NOT REPRODUCED", ok ? "ok" : "FAIL");
  num_failures += !ok;
}

bool kept(const Dropout& dropout, double probability, int column, int position, int sample, int head) {
  return probability == 0 || (keep_word(dropout, column / 32, position, sample, head) >> (column % 32) & 1);
}

std::vector<int> row_keys_of(int rows) {  // two sequences, samples 7 and 3
  std::vector<int> keys;
  for (int row = 0; row < rows; ++row) keys.insert(keys.end(), {row < rows / 2 ? 7 : 3, row < rows / 2 ? row : row - rows / 2});
  return keys;
}

template <class T>
void check_layer_norm(int rows, int width, double probability, bool all_inputs, double mean, double deviation) {
  const size_t n = (size_t)rows * width;
  const double eps = 1e-5;
  const OptDsDropout key{probability, 0x123456789abcdefull, 11};
  const Dropout dropout = make_dropout(key);
  Buffer<T> x(n, mean, deviation), residual(n, 0, deviation), input_bias(width, 0, 1), weight(width, 1, .3), bias(width, 0, .3);
  Buffer<T> d_normed(n, 0, 1), d_total(n, 0, 1), total(n), normed(n);
  Buffer<float> mu(rows), rstd(rows);
  const std::vector<int> keys = row_keys_of(rows);

  OptDsLayerNormForward f{type_of<T>(), rows, width, x.pointer(), all_inputs ? input_bias.pointer() : nullptr,
                          all_inputs ? residual.pointer() : nullptr, keys.data(), weight.pointer(), bias.pointer(), (float)eps, key,
                          all_inputs || probability > 0 ? total.pointer() : nullptr, normed.pointer(), mu.pointer(), rstd.pointer()};
  if (opt_ds_layer_norm_forward(&f, nullptr)) ++num_failures;
  if (!f.total) total.data = x.data;

  std::vector<double> t(n), y(n), d_t(n), d_x(n), d_w(width), d_b(width), d_ib(width);
  for (int r = 0; r < rows; ++r) {
    double m = 0, v = 0, a = 0, b = 0;
    for (int c = 0; c < width; ++c) {
      const size_t i = (size_t)r * width + c;
      double z = x[i];
      if (all_inputs) z = to_float(from_float<T>((float)(z + input_bias[c])));  // stored so by the unfused sequence as well
      if (probability > 0) z = kept(dropout, probability, c, keys[2 * r + 1], keys[2 * r], 0) ? z * dropout.scale : 0;
      t[i] = z + (all_inputs ? residual[i] : 0.);
      m += total[i] / width;  // of what is stored: the backward pass starts from it
    }
    for (int c = 0; c < width; ++c) v += std::pow(total[(size_t)r * width + c] - m, 2) / width;
    const double s = 1 / std::sqrt(v + eps);
    auto xhat = [&](size_t i) { return (total[i] - m) * s; };
    for (int c = 0; c < width; ++c) {
      const size_t i = (size_t)r * width + c;
      y[i] = xhat(i) * weight[c] + bias[c];
      a += d_normed[i] * weight[c] / width;
      b += d_normed[i] * weight[c] * xhat(i) / width;
      d_w[c] += d_normed[i] * xhat(i);
      d_b[c] += d_normed[i];
    }
    for (int c = 0; c < width; ++c) {
      const size_t i = (size_t)r * width + c;
      d_t[i] = s * (d_normed[i] * weight[c] - a - xhat(i) * b) + (all_inputs ? d_total[i] : 0.);
      d_x[i] = kept(dropout, probability, c, keys[2 * r + 1], keys[2 * r], 0) ? d_t[i] * (probability > 0 ? dropout.scale : 1) : 0;
      d_ib[c] += d_x[i];
    }
  }

  const int parts = opt_ds_layer_norm_parts(rows, width);
  Buffer<T> g_t[2] = {Buffer<T>(n), Buffer<T>(n)}, g_x[2] = {Buffer<T>(n), Buffer<T>(n)};
  Buffer<T> g_w[2] = {Buffer<T>(width), Buffer<T>(width)}, g_b[2] = {Buffer<T>(width), Buffer<T>(width)};
  Buffer<T> g_ib[2] = {Buffer<T>(width), Buffer<T>(width)};
  for (int run = 0; run < 2; ++run) {
    Buffer<float> partials((size_t)3 * parts * width);
    OptDsLayerNormBackward b{type_of<T>(), rows, width, d_normed.pointer(), all_inputs ? d_total.pointer() : nullptr, total.pointer(),
                             mu.pointer(), rstd.pointer(), weight.pointer(), keys.data(), key, g_t[run].pointer(),
                             probability > 0 ? g_x[run].pointer() : nullptr, partials.pointer(), parts, g_w[run].pointer(),
                             g_b[run].pointer(), all_inputs ? g_ib[run].pointer() : nullptr};
    if (opt_ds_layer_norm_backward(&b, nullptr)) ++num_failures;
  }
  const bool reproduced = same(g_t[0], g_t[1]) && (probability == 0 || same(g_x[0], g_x[1])) && same(g_w[0], g_w[1]) &&
                          same(g_b[0], g_b[1]) && (!all_inputs || same(g_ib[0], g_ib[1]));
  std::vector<double> errors = {error(total, t), error(normed, y), error(g_t[0], d_t), error(g_w[0], d_w), error(g_b[0], d_b)};
  if (probability > 0) errors.push_back(error(g_x[0], d_x));
  if (all_inputs) errors.push_back(error(g_ib[0], d_ib));
  char what[200];
  snprintf(what, sizeof what, "layer_norm %s %d x %d, dropout %.2f, %s, inputs %g +- %g", name_of<T>(), rows, width, probability,
           all_inputs ? "bias + residual" : "alone", mean, deviation);
  report(what, errors, 2 * rounding<T>(), reproduced);

  if (rows && probability > 0) {  // dropout alone, and of an input of ones
    Buffer<T> dropped(n);
    std::vector<double> truth(n);
    OptDsDropoutRows d{type_of<T>(), rows, width, x.pointer(), keys.data(), key, dropped.pointer()};
    if (opt_ds_dropout_rows(&d, nullptr)) ++num_failures;
    for (size_t i = 0; i < n; ++i)
      truth[i] = kept(dropout, probability, i % width, keys[i / width * 2 + 1], keys[i / width * 2], 0) ? x[i] * dropout.scale : 0;
    report("  dropout_rows", {error(dropped, truth)}, rounding<T>(), true);
  }
}

// `lengths` of queries and of keys; amplitude scales the queries.
template <class T>
void check_attention(const std::vector<int>& query_lengths, const std::vector<int>& key_lengths, int head_size, bool causal,
                     double probability, double amplitude) {
  const int heads = 2, sequences = (int)query_lengths.size();
  std::vector<int> cu_q{0}, cu_k{0}, sample_index;
  int max_q = 0, max_k = 0;
  for (int s = 0; s < sequences; ++s) {
    cu_q.push_back(cu_q.back() + query_lengths[s]);
    cu_k.push_back(cu_k.back() + key_lengths[s]);
    max_q = std::max(max_q, query_lengths[s]);
    max_k = std::max(max_k, key_lengths[s]);
    sample_index.push_back(5 * s + 2);
  }
  const int total_q = cu_q.back(), total_k = cu_k.back(), width = heads * head_size;
  // q, k, v interleaved as a fused projection leaves them when the lengths agree: the kernels take row strides.
  const bool fused = query_lengths == key_lengths;
  const int stride = fused ? 3 * width : width;
  Buffer<T> qkv(fused ? (size_t)total_q * stride : 0, 0, 1), q_alone(fused ? 0 : (size_t)total_q * width, 0, 1);
  Buffer<T> k_alone(fused ? 0 : (size_t)total_k * width, 0, 1), v_alone(fused ? 0 : (size_t)total_k * width, 0, 1);
  T* q = fused ? qkv.pointer() : q_alone.pointer();
  T* k = fused ? qkv.pointer() + width : k_alone.pointer();
  T* v = fused ? qkv.pointer() + 2 * width : v_alone.pointer();
  for (int i = 0; i < total_q; ++i)
    for (int d = 0; d < width; ++d) q[(size_t)i * stride + d] = from_float<T>((float)amplitude * to_float(q[(size_t)i * stride + d]));

  const OptDsDropout key{probability, 0xfedcba9876543210ull, 23};
  const Dropout dropout = make_dropout(key);
  const float scale = 1 / std::sqrt((float)head_size);
  Buffer<T> out((size_t)total_q * width), d_out((size_t)total_q * width, 0, 1);
  Buffer<float> lse((size_t)heads * total_q);
  OptDsAttention a{type_of<T>(), sequences, heads, head_size, total_q, total_k, max_q, max_k, cu_q.data(), cu_k.data(), sample_index.data(), scale,
                   causal, key, q, k, v, stride, stride, stride, out.pointer(), lse.pointer()};
  if (opt_ds_attention_forward(&a, nullptr)) ++num_failures;

  std::vector<double> o((size_t)total_q * width), l(lse.data.size()), d_q(o.size()), d_k((size_t)total_k * width), d_v(d_k.size());
  bool lse_ok = true;
  double largest_score = 1;
  for (int s = 0; s < sequences; ++s)
    for (int h = 0; h < heads; ++h)
      for (int i = 0; i < query_lengths[s]; ++i) {
        const int end = causal ? i + 1 : key_lengths[s];
        const size_t qi = (size_t)(cu_q[s] + i) * stride + h * head_size, oi = (size_t)(cu_q[s] + i) * width + h * head_size;
        auto kj = [&](int j) { return (size_t)(cu_k[s] + j) * stride + h * head_size; };
        auto gj = [&](int j) { return (size_t)(cu_k[s] + j) * width + h * head_size; };
        std::vector<double> p(end), dp(end);
        double maximum = -INFINITY, sum = 0, delta = 0;
        for (int j = 0; j < end; ++j) {
          for (int d = 0; d < head_size; ++d) p[j] += (double)to_float(q[qi + d]) * to_float(k[kj(j) + d]) * scale;
          maximum = std::max(maximum, p[j]);
          largest_score = std::max(largest_score, std::abs(p[j]));
        }
        for (double& x : p) sum += x = std::exp(x - maximum);
        const float found = lse.data[(size_t)h * total_q + cu_q[s] + i];
        if (end == 0) lse_ok &= found == -INFINITY;
        else lse_ok &= std::abs(found - (maximum + std::log(sum))) < 1e-5 * largest_score;
        for (int j = 0; j < end; ++j) {
          p[j] /= sum;
          const double c = kept(dropout, probability, j, i, sample_index[s], h) ? (probability > 0 ? dropout.scale : 1) : 0;
          for (int d = 0; d < head_size; ++d) {
            o[oi + d] += c * p[j] * to_float(v[kj(j) + d]);
            dp[j] += c * d_out[oi + d] * to_float(v[kj(j) + d]);
            d_v[gj(j) + d] += c * p[j] * d_out[oi + d];
          }
          delta += p[j] * dp[j];
        }
        for (int j = 0; j < end; ++j)
          for (int d = 0; d < head_size; ++d) {
            const double ds = p[j] * (dp[j] - delta) * scale;
            d_q[oi + d] += ds * to_float(k[kj(j) + d]);
            d_k[gj(j) + d] += ds * to_float(q[qi + d]);
          }
      }

  Buffer<T> g_q[2] = {Buffer<T>(d_q.size()), Buffer<T>(d_q.size())}, g_k[2] = {Buffer<T>(d_k.size()), Buffer<T>(d_k.size())};
  Buffer<T> g_v[2] = {Buffer<T>(d_k.size()), Buffer<T>(d_k.size())};
  for (int run = 0; run < 2; ++run) {
    Buffer<float> delta(lse.data.size());
    OptDsAttentionBackward b{a, d_out.pointer(), delta.pointer(), g_q[run].pointer(), g_k[run].pointer(), g_v[run].pointer()};
    if (opt_ds_attention_backward(&b, nullptr)) ++num_failures;
  }
  char what[300];
  int at = snprintf(what, sizeof what, "attention %s D=%d %s, dropout %.2f, amplitude %g, lengths", name_of<T>(), head_size,
                    causal ? "causal" : fused ? "full" : "cross", probability, amplitude);
  for (int s = 0; s < sequences && at < 250; ++s) at += snprintf(what + at, sizeof what - at, " %d", query_lengths[s]);
  // dS is as exact as delta, a sum of stored outputs, even where it is all but 0 (one-hot softmax); d_k is dS times scale * q.
  // A rounding of the inputs' products moves a score by about rounding * |score|: only the stored types' rounding is allowed for.
  report(what, {error(out, o), error(g_q[0], d_q), error(g_k[0], d_k, amplitude * scale), error(g_v[0], d_v), lse_ok ? 0 : NAN},
         8 * std::max(rounding<T>(), 2e-7 * largest_score), same(g_q[0], g_q[1]) && same(g_k[0], g_k[1]) && same(g_v[0], g_v[1]));
}

void layer_norms(bool full) {
  check_layer_norm<half>(9, 768, .1, true, 0, 1);
  check_layer_norm<half>(3, 2048, .1, true, 0, 1);
  check_layer_norm<half>(14, 1536, .1, true, 0, 1);  // more rows than blocks
  check_layer_norm<half>(2, 100, .3, true, 0, 1);
  check_layer_norm<float>(5, 64, 0, false, 0, 1);
  check_layer_norm<bfloat16>(4, 200, .5, true, 0, 1);
  if (!full) return;
  for (double probability : {0., .1})
    for (int width : {64, 256, 264, 512, 1024, 1032, 4096, 6144, 8192}) check_layer_norm<half>(width > 2000 ? 2 : 30, width, probability, true, 0, 1);
  for (int width : {1, 7, 63, 1001, 8200}) check_layer_norm<half>(3, width, .1, true, 0, 1);
  for (int rows : {0, 1, 2, 100}) check_layer_norm<float>(rows, 192, .1, rows % 2, 0, 1);
  check_layer_norm<half>(6, 768, .1, true, 300, 1);
  check_layer_norm<half>(6, 768, 0, false, 5, 0);  // rows of equal values
  check_layer_norm<float>(6, 768, .1, true, 1e4, 1e3);
  check_layer_norm<bfloat16>(6, 1536, .1, true, 0, 1000);
}

template <class T>
void attentions(bool full, const std::vector<int>& head_sizes) {
  for (int size : head_sizes) {
    check_attention<T>({70, 1, 33}, {70, 1, 33}, size, false, .2, 1);
    check_attention<T>({45, 130}, {45, 130}, size, true, .1, 1);
    check_attention<T>({20, 3, 0, 5}, {65, 0, 7, 40}, size, false, .1, 3);
    if (!full) continue;
    check_attention<T>({1, 2, 15, 16, 17, 63, 64, 65, 127, 130}, {1, 2, 15, 16, 17, 63, 64, 65, 127, 130}, size, false, 0, 1);
    check_attention<T>({257}, {257}, size, true, .1, 4);
    check_attention<T>({31, 32, 33, 96}, {31, 32, 33, 96}, size, true, 0, 1);
    check_attention<T>({129, 40}, {17, 200}, size, false, .3, 1);
    check_attention<T>({40, 66}, {40, 66}, size, false, .1, 300);  // scores in the hundreds: the softmax is one-hot
    check_attention<T>({50}, {50}, size, true, .1, 0);              // equal scores
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "all";
  const bool full = argc > 2 && std::string(argv[2]) == "full";
  if (what == "all" || what == "layer_norm") layer_norms(full);
  if (what == "all" || what == "attention") {
    attentions<half>(full, {32, 64, 128});
    if (OPT_DS_EMULATED_ARCH >= 80) attentions<bfloat16>(full, {64});
  }
  if (what == "all" || what == "plain") {
    attentions<float>(false, {64});
    attentions<bfloat16>(false, {40});
    if (OPT_DS_EMULATED_ARCH < 80) attentions<bfloat16>(false, {64});  // its tensor cores take no bf16
  }
  printf("%s\n", num_failures ? "FAIL" : "all ok");
  return num_failures != 0;
}

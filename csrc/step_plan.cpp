// What the step plan repeats for every sample, compiled: hashing keys, permuting positions, assigning samples to micro-batches.
// Each function returns, bit for bit, what its NumPy form in opt_ds/data/keyed.py and opt_ds/data/micro_batches.py returns;
// those explain the algorithms. Plain C++ on the CPU, one thread.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdint>
#include <queue>
#include <utility>
#include <vector>

using at::Tensor;

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull, kStart = 0x243F6A8885A308D3ull;
constexpr int kFeistelRounds = 6;

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

uint64_t absorb(uint64_t state, uint64_t key) { return mix((state ^ key) + kGolden); }

uint64_t* data(Tensor& x) { return reinterpret_cast<uint64_t*>(x.mutable_data_ptr<int64_t>()); }
const uint64_t* data(const Tensor& x) { return reinterpret_cast<const uint64_t*>(x.const_data_ptr<int64_t>()); }

// keys: int64 [n] contiguous, or one element that is the same for all n.
Tensor keyed_hash(const std::vector<Tensor>& keys, int64_t n) {
  Tensor hashes = at::full({n}, static_cast<int64_t>(kStart), at::kLong);
  uint64_t* out = data(hashes);
  for (const Tensor& key : keys) {
    TORCH_CHECK(key.scalar_type() == at::kLong && key.is_contiguous() && (key.numel() == n || key.numel() == 1),
                "keyed_hash: each key is contiguous int64 with ", n, " elements or one");
    const uint64_t* value = data(key);
    if (key.numel() == n)
      for (int64_t i = 0; i < n; ++i) out[i] = absorb(out[i], value[i]);
    else
      for (int64_t i = 0; i < n; ++i) out[i] = absorb(out[i], value[0]);
  }
  return hashes;
}

// index, keys: int64 [n]; 0 <= index < count.
Tensor permute(const Tensor& index, int64_t count, const Tensor& keys) {
  TORCH_CHECK(index.is_contiguous() && keys.is_contiguous() && keys.numel() == index.numel(), "permute: one key for each index");
  const uint64_t limit = count;
  int bits = 0;
  for (uint64_t rest = count > 1 ? limit - 1 : 1; rest; rest >>= 1) ++bits;
  const int half = std::max(1, (bits + 1) / 2);
  const uint64_t mask = (1ull << half) - 1;
  Tensor images = at::empty_like(index);
  uint64_t* out = data(images);
  const uint64_t *in = data(index), *key = data(keys);
  for (int64_t i = 0; i < index.numel(); ++i) {
    uint64_t value = in[i], rounds[kFeistelRounds];
    for (int round = 0; round < kFeistelRounds; ++round) rounds[round] = absorb(absorb(kStart, key[i]), round);
    do {
      uint64_t left = value >> half, right = value & mask;
      for (uint64_t state : rounds) {
        const uint64_t next = left ^ (absorb(state, right) & mask);
        left = right;
        right = next;
      }
      value = (left << half) | right;
    } while (value >= limit);
    out[i] = value;
  }
  return images;
}

// Longest processing time first. num_tokens int64 [n], costs float64 [n], both in the order in which samples are taken, the
// dearest first. Returns int64 [n], each one's micro-batch; empty if a sample finds no room in the `tries` cheapest ones.
Tensor assign_samples(const Tensor& num_tokens, const Tensor& costs, int64_t bins, int64_t max_tokens, int64_t tries) {
  const int64_t n = num_tokens.numel();
  TORCH_CHECK(num_tokens.is_contiguous() && costs.is_contiguous() && costs.numel() == n, "assign_samples: one cost for each sample");
  const int64_t* tokens = num_tokens.const_data_ptr<int64_t>();
  const double* cost = costs.const_data_ptr<double>();
  std::vector<int64_t> smallest(n), used(bins);  // smallest: of this sample and all after it
  for (int64_t i = n - 1; i >= 0; --i) smallest[i] = i + 1 < n ? std::min(tokens[i], smallest[i + 1]) : tokens[i];

  using Bin = std::pair<double, int64_t>;  // cost so far, number; no two are equal, so the order of taking them is fixed
  std::priority_queue<Bin, std::vector<Bin>, std::greater<Bin>> cheapest;
  for (int64_t bin = 0; bin < bins; ++bin) cheapest.emplace(0.0, bin);
  Tensor assigned = at::empty({n}, at::kLong);
  int64_t* bin_of = assigned.mutable_data_ptr<int64_t>();
  std::vector<Bin> passed_over;
  for (int64_t i = 0; i < n; ++i) {
    passed_over.clear();
    bool placed = false;
    while (!placed && !cheapest.empty() && static_cast<int64_t>(passed_over.size()) < tries) {
      const Bin bin = cheapest.top();
      cheapest.pop();
      if (used[bin.second] + tokens[i] <= max_tokens) {
        bin_of[i] = bin.second;
        used[bin.second] += tokens[i];
        cheapest.emplace(bin.first + cost[i], bin.second);
        placed = true;
      } else if (used[bin.second] + smallest[i] <= max_tokens) {  // otherwise it is full for all that follow
        passed_over.push_back(bin);
      }
    }
    if (!placed) return at::empty({0}, at::kLong);
    for (const Bin& bin : passed_over) cheapest.push(bin);
  }
  return assigned;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(opt_ds, m) {
  m.def("keyed_hash(Tensor[] keys, int n) -> Tensor");
  m.def("permute(Tensor index, int count, Tensor keys) -> Tensor");
  m.def("assign_samples(Tensor num_tokens, Tensor costs, int bins, int max_tokens, int tries) -> Tensor");
  m.impl("permute", at::DispatchKey::CPU, permute);
  m.impl("assign_samples", at::DispatchKey::CPU, assign_samples);
  m.impl("keyed_hash", at::DispatchKey::CompositeExplicitAutograd, [](const c10::List<Tensor>& keys, int64_t n) {
    return keyed_hash({keys.begin(), keys.end()}, n);
  });
}

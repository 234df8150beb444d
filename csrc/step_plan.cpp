// The step plan's work per sample, compiled: hashing keys, permuting positions, assigning samples to micro-batches.
// Each function returns, bit for bit, what its NumPy form in opt_ds/ops/keyed.py and opt_ds/data/micro_batches.py returns;
// those explain the algorithms. Plain C++ on the CPU, one thread.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

using at::Tensor;

namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull, kStart = 0x243F6A8885A308D3ull;
constexpr int kFeistelRounds = 6;
constexpr int64_t kBlock = 512;  // hashes that stay in the nearest cache while all their keys are absorbed
constexpr int kLanes = 8;        // cycles of a permutation that are computed together, because a single one waits for its products

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
  uint64_t state = kStart;  // of the leading keys that are the same for all
  size_t first = 0;
  for (const Tensor& key : keys)
    TORCH_CHECK(key.scalar_type() == at::kLong && key.is_contiguous() && (key.numel() == n || key.numel() == 1),
                "keyed_hash: each key is contiguous int64 with ", n, " elements or one");
  for (; first < keys.size() && keys[first].numel() == 1; ++first) state = absorb(state, *data(keys[first]));
  Tensor hashes = at::full({n}, static_cast<int64_t>(state), at::kLong);
  uint64_t* out = data(hashes);
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(n, start + kBlock);
    for (size_t number = first; number < keys.size(); ++number) {
      const uint64_t* value = data(keys[number]);
      if (keys[number].numel() == n)
        for (int64_t i = start; i < end; ++i) out[i] = absorb(out[i], value[i]);
      else
        for (int64_t i = start; i < end; ++i) out[i] = absorb(out[i], *value);
    }
  }
  return hashes;
}

// index, keys: int64 [n]; 0 <= index < count.
Tensor permute(const Tensor& index, int64_t count, const Tensor& keys) {
  TORCH_CHECK(index.is_contiguous() && keys.is_contiguous() && keys.numel() == index.numel(), "permute: one key for each index");
  const uint64_t limit = count;
  const int bits = std::bit_width(count > 1 ? limit - 1 : 1);
  const int half = std::max(1, (bits + 1) / 2);
  const uint64_t mask = (1ull << half) - 1;
  Tensor images = index.clone();
  uint64_t* image = data(images);
  const uint64_t* key = data(keys);
  std::vector<int64_t> walking(index.numel());
  std::iota(walking.begin(), walking.end(), 0);
  uint64_t rounds[kLanes][kFeistelRounds] = {}, key_of[kLanes], left[kLanes], right[kLanes];
  bool known[kLanes] = {};  // whether a lane's `rounds` are those of `key_of`: neighbours mostly have the same key
  while (!walking.empty()) {
    size_t still = 0;
    for (size_t start = 0; start < walking.size(); start += kLanes) {
      const int lanes = std::min<size_t>(kLanes, walking.size() - start);
      for (int lane = 0; lane < kLanes; ++lane) {  // lanes without a cycle repeat the last one
        const int64_t i = walking[start + std::min(lane, lanes - 1)];
        left[lane] = image[i] >> half, right[lane] = image[i] & mask;
        if (known[lane] && key_of[lane] == key[i]) continue;
        for (int round = 0; round < kFeistelRounds; ++round) rounds[lane][round] = absorb(absorb(kStart, key[i]), round);
        known[lane] = true, key_of[lane] = key[i];
      }
      for (int round = 0; round < kFeistelRounds; ++round)
        for (int lane = 0; lane < kLanes; ++lane) {
          const uint64_t next = left[lane] ^ (absorb(rounds[lane][round], right[lane]) & mask);
          left[lane] = right[lane], right[lane] = next;
        }
      for (int lane = 0; lane < lanes; ++lane) {
        const int64_t i = walking[start + lane];
        image[i] = (left[lane] << half) | right[lane];
        walking[still] = i;
        still += image[i] >= limit;
      }
    }
    walking.resize(still);
  }
  return images;
}

// The order of a stable sort of values from the largest to the smallest: by 11 bits at a time, from the lowest.
std::vector<int32_t> largest_first(std::span<const double> values) {
  constexpr int kDigit = 11;
  struct Item {
    uint64_t key;
    int32_t place;
  };
  std::vector<Item> items(values.size()), sorted(values.size());
  uint64_t varying = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const uint64_t bits = std::bit_cast<uint64_t>(-values[i] + 0.0);  // of -0.0 and 0.0 neither is the larger
    items[i] = {bits >> 63 ? ~bits : bits | 1ull << 63, static_cast<int32_t>(i)};
    varying |= items[i].key ^ items[0].key;
  }
  for (int shift = 0; shift < 64; shift += kDigit) {
    constexpr uint64_t kMask = (1ull << kDigit) - 1;
    if (!(varying >> shift & kMask)) continue;
    std::vector<int32_t> starts(kMask + 2);
    for (const Item& item : items) ++starts[(item.key >> shift & kMask) + 1];
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    for (const Item& item : items) sorted[starts[item.key >> shift & kMask]++] = item;
    items.swap(sorted);
  }
  std::vector<int32_t> order(values.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = items[i].place;
  return order;
}

// The cheapest of many bins, of equal ones the first; a tree of matches, whose root is the winner.
class CheapestBin {
 public:
  explicit CheapestBin(int64_t bins) : leaves_(std::bit_ceil(static_cast<uint64_t>(bins))), nodes_(2 * leaves_, entry(0, kGone)) {
    for (int64_t bin = 0; bin < bins; ++bin) nodes_[leaves_ + bin] = entry(bin, 0.0);
    for (int64_t node = leaves_ - 1; node > 0; --node) nodes_[node] = std::min(nodes_[2 * node], nodes_[2 * node + 1]);
  }
  bool empty() const { return cost() == kGone; }
  int64_t number() const { return static_cast<int64_t>(nodes_[1]); }
  double cost() const { return std::bit_cast<double>(static_cast<uint64_t>(nodes_[1] >> 64)); }
  void remove(int64_t bin) { set(bin, kGone); }
  void set(int64_t bin, double cost) {
    int64_t node = leaves_ + bin;
    Entry won = nodes_[node] = entry(bin, cost);
    for (; node > 1; node /= 2) {
      const Entry other = nodes_[node ^ 1];
      won = other < won ? other : won;
      nodes_[node / 2] = won;
    }
  }

 private:
  using Entry = unsigned __int128;  // bits of the cost, which order numbers from 0 on as the numbers themselves, and the bin
  static constexpr double kGone = std::numeric_limits<double>::infinity();
  static Entry entry(int64_t bin, double cost) { return Entry{std::bit_cast<uint64_t>(cost)} << 64 | static_cast<uint64_t>(bin); }

  int64_t leaves_;
  std::vector<Entry> nodes_;  // node i has the children 2i and 2i + 1
};

// Each sample's micro-batch, given the order in which the samples are taken; none if one does not fit into the `tries` cheapest.
std::vector<int32_t> assign(std::span<const int64_t> tokens, std::span<const double> costs, std::span<const int32_t> order,
                            int64_t bins, int64_t max_tokens, int64_t tries) {
  const size_t n = tokens.size();
  std::vector<int64_t> smallest(n + 1, std::numeric_limits<int64_t>::max()), used(bins);  // smallest: of those yet to be taken
  for (size_t i = n; i-- > 0;) smallest[i] = std::min(tokens[order[i]], smallest[i + 1]);
  CheapestBin cheapest(bins);
  std::vector<int32_t> bin_of(n);
  std::vector<std::pair<int64_t, double>> passed_over;
  for (size_t i = 0; i < n; ++i) {
    const int64_t own = tokens[order[i]];
    passed_over.clear();
    while (true) {
      if (cheapest.empty() || static_cast<int64_t>(passed_over.size()) == tries) return {};
      const int64_t bin = cheapest.number();
      if (used[bin] + own <= max_tokens) {
        bin_of[order[i]] = bin;
        used[bin] += own;
        cheapest.set(bin, cheapest.cost() + costs[order[i]]);
        break;
      }
      if (used[bin] + smallest[i] <= max_tokens) passed_over.emplace_back(bin, cheapest.cost());  // otherwise it is full for all
      cheapest.remove(bin);
    }
    for (const auto& [bin, cost] : passed_over) cheapest.set(bin, cost);
  }
  return bin_of;
}

// The bits of NumPy's sum: up to 8 one after another, up to 128 in eight running sums, more in halves.
double numpy_sum(std::span<const double> x) {
  const size_t n = x.size();
  if (n > 128) {
    const size_t half = n / 2 - n / 2 % 8;
    return numpy_sum(x.first(half)) + numpy_sum(x.subspan(half));
  }
  size_t i = 0;
  double sum = 0;
  if (n >= 8) {
    double r[8];
    std::copy_n(x.begin(), 8, r);
    for (i = 8; i + 8 <= n; i += 8)
      for (int lane = 0; lane < 8; ++lane) r[lane] += x[i + lane];
    sum = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
  }
  for (; i < n; ++i) sum += x[i];
  return sum;
}

// num_tokens int64 [n], costs float64 [n], from 0 on. Returns the micro-batches in the order [rank][k]: the places of their samples int64 [n],
// micro-batch by micro-batch and ascending in each; how many each has, their tokens int64, their costs float64.
std::vector<Tensor> distribute(const Tensor& num_tokens, const Tensor& costs, int64_t world_size, int64_t max_tokens, int64_t tries) {
  const int64_t n = num_tokens.numel();
  TORCH_CHECK(num_tokens.is_contiguous() && costs.is_contiguous() && costs.numel() == n, "distribute: one cost for each sample");
  TORCH_CHECK(n < std::numeric_limits<int32_t>::max(), "distribute: too many samples");
  const std::span<const int64_t> tokens(num_tokens.const_data_ptr<int64_t>(), n);
  const std::span<const double> cost(costs.const_data_ptr<double>(), n);

  const std::vector<int32_t> order = largest_first(cost);
  const int64_t total = std::accumulate(tokens.begin(), tokens.end(), int64_t{0}), budget = world_size * max_tokens;
  int64_t rounds = std::max<int64_t>(1, (total + budget - 1) / budget);
  std::vector<int32_t> bin_of;
  while ((bin_of = assign(tokens, cost, order, world_size * rounds, max_tokens, tries)).size() < static_cast<size_t>(n))
    rounds += std::max<int64_t>(1, rounds / 64);

  const int64_t bins = world_size * rounds;
  std::vector<int64_t> starts(bins + 1);
  for (int32_t bin : bin_of) ++starts[bin + 1];
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  std::vector<double> ordered(n), sums(bins);  // costs bin by bin, in the order of being taken
  std::vector<int64_t> ends(starts);
  for (int32_t place : order) ordered[ends[bin_of[place]]++] = cost[place];
  for (int64_t bin = 0; bin < bins; ++bin)
    sums[bin] = numpy_sum(std::span<const double>(ordered).subspan(starts[bin], starts[bin + 1] - starts[bin]));

  std::vector<int64_t> dealt(bins);  // bin -> its place in [rank][k]: to and fro over the ranks, so that their sums are equal too
  int64_t taken = 0;
  for (int32_t bin : largest_first(sums)) {
    const int64_t lap = taken / world_size, rank = taken % world_size;
    dealt[bin] = (lap % 2 ? world_size - 1 - rank : rank) * rounds + lap;
    ++taken;
  }

  Tensor members = at::empty({n}, at::kLong), sizes = at::zeros({bins}, at::kLong), own_tokens = at::zeros({bins}, at::kLong);
  Tensor own_costs = at::empty({bins}, at::kDouble);
  int64_t *member = members.mutable_data_ptr<int64_t>(), *size = sizes.mutable_data_ptr<int64_t>();
  for (int64_t bin = 0; bin < bins; ++bin) {
    size[dealt[bin]] = starts[bin + 1] - starts[bin];
    own_costs.mutable_data_ptr<double>()[dealt[bin]] = sums[bin];
  }
  std::vector<int64_t> next(bins);
  std::exclusive_scan(size, size + bins, next.begin(), int64_t{0});
  int64_t* sum = own_tokens.mutable_data_ptr<int64_t>();
  for (int64_t place = 0; place < n; ++place) {
    const int64_t bin = dealt[bin_of[place]];
    member[next[bin]++] = place;
    sum[bin] += tokens[place];
  }
  return {members, sizes, own_tokens, own_costs};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(opt_ds, m) {
  m.def("keyed_hash(Tensor[] keys, int n) -> Tensor");
  m.def("permute(Tensor index, int count, Tensor keys) -> Tensor");
  m.def("distribute(Tensor num_tokens, Tensor costs, int world_size, int max_tokens, int tries) -> Tensor[]");
  m.impl("permute", at::DispatchKey::CPU, permute);
  m.impl("distribute", at::DispatchKey::CPU, distribute);
  m.impl("keyed_hash", at::DispatchKey::CompositeExplicitAutograd, [](const c10::List<Tensor>& keys, int64_t n) {
    return keyed_hash({keys.begin(), keys.end()}, n);
  });
}

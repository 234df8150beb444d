// Dropout without a state: whether an element is kept is a function of what the element is, not of who computes it, so the CPU,
// the emulator and every GPU agree bit for bit, and the backward pass computes the forward pass's mask again instead of storing it.
//
// 1. Philox4x32 with 7 rounds (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"; 7 is the paper's smallest
//    crush-resistant number). Key: 64 bits of (seed, step). Counter, 4 x 32 bits:
//        [0] calls * (column / 32) + call     column: of the row, or the key position of an attention probability
//        [1] position of the row (or query) in its sequence
//        [2] sample: its index in the global batch, whatever rank holds it
//        [3] layer_id + 65536 * head       layer_id: which dropout of the model
// 2. A "keep word" decides 32 neighbouring columns at once: bit j is the fate of column 32 * (column / 32) + j. Four calls give 16
//    words; bit j of word i is bit i of a 16-bit random number of column j, and "is it below the threshold" is computed for all 32
//    columns together, bit by bit from the lowest: below = (x < t in this bit) or (equal in this bit and below so far). That is one
//    three-input logic instruction a bit, instead of an extraction and a comparison for each element.
//
// The probability is rounded to 1/65536 and survivors are scaled by the rounded one: the mean is exact.
#pragma once
#include "opt_ds/qualifiers.h"

namespace opt_ds {

constexpr int kPhiloxRounds = 7;
constexpr int kDropoutBits = 16;

// Prepared on the host once per launch. As a kernel parameter it lies in constant memory, which instructions read for free.
struct Dropout {
  unsigned round_keys[kPhiloxRounds][2];
  unsigned threshold_bits[kDropoutBits];  // bit i of the threshold, spread over a word
  unsigned layer_id;
  float scale;  // 1 / (1 - probability)
};

inline Dropout make_dropout(double probability, unsigned long long key, unsigned layer_id) {
  Dropout dropout{};
  unsigned key0 = (unsigned)key, key1 = (unsigned)(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    dropout.round_keys[round][0] = key0;
    dropout.round_keys[round][1] = key1;
    key0 += 0x9E3779B9u;  // the golden ratio and sqrt(3) - 1, as in the paper
    key1 += 0xBB67AE85u;
  }
  const unsigned threshold = (unsigned)(probability * (1 << kDropoutBits) + 0.5);
  for (int i = 0; i < kDropoutBits; ++i) dropout.threshold_bits[i] = 0u - (threshold >> i & 1);
  dropout.layer_id = layer_id;
  dropout.scale = (float)(1.0 / (1.0 - threshold / (double)(1 << kDropoutBits)));
  return dropout;
}

__host__ __device__ __forceinline__ void multiply_wide(unsigned a, unsigned b, unsigned& high, unsigned& low) {
  const unsigned long long product = (unsigned long long)a * b;
  high = (unsigned)(product >> 32);
  low = (unsigned)product;
}

__host__ __device__ __forceinline__ void philox(const Dropout& dropout, unsigned c0, unsigned c1, unsigned c2, unsigned c3,
                                                unsigned (&random)[4]) {
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    unsigned high0, low0, high1, low1;
    multiply_wide(0xD2511F53u, c0, high0, low0);
    multiply_wide(0xCD9E8D57u, c2, high1, low1);
    c0 = high1 ^ c1 ^ dropout.round_keys[round][0];
    c1 = low1;
    c2 = high0 ^ c3 ^ dropout.round_keys[round][1];
    c3 = low0;
  }
  random[0] = c0, random[1] = c1, random[2] = c2, random[3] = c3;
}

// Bit j: column 32 * block + j of this row (of this head) is kept.
__host__ __device__ __forceinline__ unsigned keep_word(const Dropout& dropout, unsigned block, unsigned position, unsigned sample,
                                                       unsigned head) {
  unsigned below = 0;
#pragma unroll
  for (int call = 0; call < kDropoutBits / 4; ++call) {
    unsigned words[4];
    philox(dropout, kDropoutBits / 4 * block + call, position, sample, dropout.layer_id + (head << 16), words);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned t = dropout.threshold_bits[4 * call + i];
      below = (~words[i] & t) | (~(words[i] ^ t) & below);
    }
  }
  return ~below;
}

}  // namespace opt_ds

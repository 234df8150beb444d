// Small kernels with one fault each: the emulator and the sanitizers must see it. `check_emulator none` runs the sound versions.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "opt_ds/device.h"

namespace {

std::string fault;
bool with(const char* name) { return fault == name; }

__global__ void reverse_block(const float* in, float* out, bool missing_barrier) {
  OPT_DS_SHARED_MEMORY(shared);
  float* values = reinterpret_cast<float*>(shared);
  values[threadIdx.x] = in[threadIdx.x];
  if (!missing_barrier) __syncthreads();
  out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

__global__ void reverse_warp(const float* in, float* out, bool missing_syncwarp) {
  OPT_DS_SHARED_MEMORY(shared);
  float* values = reinterpret_cast<float*>(shared) + threadIdx.x / 32 * 32;
  values[threadIdx.x % 32] = in[threadIdx.x];
  if (!missing_syncwarp) __syncwarp();
  out[threadIdx.x] = values[31 - threadIdx.x % 32];
}

__global__ void shuffle(const float* in, float* out, bool outside_mask, bool wrong_mask) {
  const float value = in[threadIdx.x];
  out[threadIdx.x] = value;
  if (threadIdx.x % 32 < 16 || wrong_mask) out[threadIdx.x] = __shfl_xor_sync(0xffffu, value, outside_mask ? 16 : 8);
}

__global__ void divergent_barrier(bool diverges) {
  if (diverges && threadIdx.x < 16) __syncwarp();  // for lanes that wait elsewhere
  __syncthreads();
}

__global__ void sum_of_blocks(float* total, bool races) {
  if (races && threadIdx.x == 0) *total += 1.f;
}

__global__ void off_the_end(const float* in, float* out, int n, bool overruns) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n || overruns) out[i] = in[i];
}

__global__ void misaligned(unsigned* out, bool wrong) {
  OPT_DS_SHARED_MEMORY(shared);
  for (int i = threadIdx.x; i < 512; i += 32) shared[i] = 0;
  __syncthreads();
  uint4 x;
  simt::ldmatrix_x4(&x.x, shared + 16 * (threadIdx.x % 8) + (wrong ? 8 : 0), false);
  out[threadIdx.x] = x.x;
}

}  // namespace

int main(int argc, char** argv) {
  fault = argc > 1 ? argv[1] : "none";
  std::vector<float> in(64), out(64, -1.f);
  for (int i = 0; i < 64; ++i) in[i] = (float)i;
  const float* from = in.data();
  float* to = out.data();
  bool ok = true;

  const bool missing_barrier = with("missing barrier"), missing_syncwarp = with("missing syncwarp");
  OPT_DS_LAUNCH(reverse_block, 1, 64, 256, nullptr, from, to, missing_barrier);
  for (int i = 0; i < 64; ++i) ok &= out[i] == 63.f - i;
  OPT_DS_LAUNCH(reverse_warp, 1, 64, 256, nullptr, from, to, missing_syncwarp);
  for (int i = 0; i < 64; ++i) ok &= out[i] == i / 32 * 32 + 31.f - i % 32;
  const bool outside_mask = with("shuffle outside its mask"), wrong_mask = with("wrong shuffle mask");
  OPT_DS_LAUNCH(shuffle, 1, 64, 0, nullptr, from, to, outside_mask, wrong_mask);
  for (int i = 0; i < 64; ++i) ok &= out[i] == (i % 32 < 16 ? i ^ 8 : i);
  const bool diverges = with("divergent barrier");
  OPT_DS_LAUNCH(divergent_barrier, 1, 64, 0, nullptr, diverges);
  float total = 0;
  float* sum = &total;
  const bool races = with("race between blocks");
  OPT_DS_LAUNCH(sum_of_blocks, 4, 32, 0, nullptr, sum, races);
  const bool overruns = with("tail overrun");
  OPT_DS_LAUNCH(off_the_end, 3, 32, 0, nullptr, from, to, 64, overruns);
  std::vector<unsigned> words(32);
  unsigned* word = words.data();
  const bool wrong = with("misaligned ldmatrix");
  OPT_DS_LAUNCH(misaligned, 1, 32, 512, nullptr, word, wrong);
  printf("%s\n", ok ? "ok" : "FAIL");
  return !ok;
}

// The emulator's runtime: runs a grid block by block, a block as one fiber per thread.
//
// What it checks while it runs: a block that cannot continue (divergent barriers), lanes that meet in different warp operations or
// masks, a shuffle from a lane outside the mask, misaligned ldmatrix rows. Shared memory starts as NaN (all bits set).
//
// Sanitizers. AddressSanitizer and ThreadSanitizer know about fibers when told (SIMT_ASAN, SIMT_TSAN). Under ThreadSanitizer only
// the kernels are instrumented, never this file; barriers are announced as release/acquire pairs, while shuffles are not, because
// on a GPU they order no memory. Two threads of different blocks have no order at all, so a race between blocks shows too.
#include "simt.h"

#include <sys/mman.h>

#include <cstdio>
#include <mutex>
#include <numeric>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#ifdef SIMT_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define TSAN(call) call
#else
#define TSAN(call)
#endif
#ifdef SIMT_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}
#define ASAN(call) call
#else
#define ASAN(call)
#endif

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

// Push the callee-saved registers, store the stack pointer in *save, continue on the stack `to` (x86-64, System V).
extern "C" void simt_switch(void** save, void* to);
asm(R"(
.text
.globl simt_switch
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

namespace simt {

Context* current;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kFullMask = 0xffffffffu;

struct Fiber {
  Context context;
  void* stack_pointer;
  char* stack;
  bool done;
  int warp;
  void* tsan_fiber;
  void* asan_fake_stack;
};

struct Warp {
  unsigned alive;       // lanes that have not returned
  unsigned arrived;     // lanes that wait in the current operation
  unsigned mask;        // lanes that the current operation waits for
  unsigned generation;  // counts operations
  const char* operation;
  uint64_t shuffled[32];
  unsigned a[32][4], b[32][4];  // operand registers of a tensor-core instruction
  const void* rows[32];         // of ldmatrix
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Fiber* self;
unsigned num_alive, num_at_barrier, barrier_generation;
uint64_t progress;
void (*kernel_body)(void*);
void* kernel_argument;

void* main_stack_pointer;
[[maybe_unused]] void* main_tsan_fiber;
[[maybe_unused]] void* main_fake_stack;
[[maybe_unused]] const void* main_stack;
[[maybe_unused]] size_t main_stack_bytes;

// Addresses that stand for "the barrier of this block", "of this warp", "the launch" in ThreadSanitizer's eyes.
[[maybe_unused]] char barrier_marks[1 << 16], warp_marks[1 << 16], start_mark, end_mark;
unsigned block_number;
[[maybe_unused]] void* barrier_mark() { return &barrier_marks[block_number & 0xffff]; }
[[maybe_unused]] void* warp_mark() { return &warp_marks[(block_number * 32 + self->warp) & 0xffff]; }

[[noreturn]] void die(const char* what) {
  const Context& c = self->context;
  fprintf(stderr, "simt: %s (block %u,%u,%u thread %u)\n", what, c.block.x, c.block.y, c.block.z, c.thread.x);
  abort();
}

void yield_to_scheduler([[maybe_unused]] bool last = false) {
  Fiber* fiber = self;
  TSAN(__tsan_switch_to_fiber(main_tsan_fiber, 1));
  ASAN(__sanitizer_start_switch_fiber(last ? nullptr : &fiber->asan_fake_stack, main_stack, main_stack_bytes));
  simt_switch(&fiber->stack_pointer, main_stack_pointer);
  ASAN(__sanitizer_finish_switch_fiber(fiber->asan_fake_stack, &main_stack, &main_stack_bytes));
}

void resume(Fiber* fiber) {
  self = fiber;
  current = &fiber->context;
  TSAN(__tsan_switch_to_fiber(fiber->tsan_fiber, 1));
  ASAN(__sanitizer_start_switch_fiber(&main_fake_stack, fiber->stack, kStackBytes));
  simt_switch(&main_stack_pointer, fiber->stack_pointer);
  ASAN(__sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr));
}

void fiber_main() {
  ASAN(__sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes));
  TSAN(__tsan_acquire(&start_mark));
  kernel_body(kernel_argument);
  self->done = true;
  ++progress;
  --num_alive;
  warps[self->warp].alive &= ~(1u << self->context.lane);
  if (num_at_barrier && num_at_barrier == num_alive) {  // an exited thread counts as arrived
    num_at_barrier = 0;
    ++barrier_generation;
  }
  TSAN(__tsan_release(&end_mark));
  yield_to_scheduler(true);
  abort();
}

// Lanes of `mask` meet in `operation`. Convergence only: no memory is ordered.
void meet(unsigned mask, const char* operation) {
  Warp& warp = warps[self->warp];
  const unsigned bit = 1u << self->context.lane;
  ++progress;
  if (!(mask & bit)) die("a lane is not in its own mask");
  if (mask & ~warp.alive) die("a mask names a lane that has returned");
  if (warp.arrived && (warp.mask != mask || warp.operation != operation))
    die("lanes of a warp meet in different operations or masks");
  warp.mask = mask;
  warp.operation = operation;
  warp.arrived |= bit;
  const unsigned generation = warp.generation;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    ++warp.generation;
  } else {
    while (generation == warp.generation) yield_to_scheduler();
  }
}

float half_of(const unsigned* registers, int element, bool bfloat16 = false) {
  const uint16_t bits = (uint16_t)(registers[element / 2] >> (16 * (element & 1)));
  return bfloat16 ? from_bits<float>((uint32_t)bits << 16) : (float)from_bits<_Float16>(bits);
}

void publish_operands(const unsigned* a, int num_a, const unsigned* b, int num_b, const char* operation) {
  Warp& warp = warps[self->warp];
  // Not memcpy: ThreadSanitizer intercepts it even here, and would take the runtime's own copies for races of the kernel.
  for (int i = 0; i < num_a; ++i) warp.a[self->context.lane][i] = a[i];
  for (int i = 0; i < num_b; ++i) warp.b[self->context.lane][i] = b[i];
  meet(kFullMask, operation);
}

}  // namespace

void trap() { die("the kernel stopped itself (__trap)"); }

void sync_threads() {
  TSAN(__tsan_release(barrier_mark()));
  ++progress;
  const unsigned generation = barrier_generation;
  if (++num_at_barrier == num_alive) {
    num_at_barrier = 0;
    ++barrier_generation;
  } else {
    while (generation == barrier_generation) yield_to_scheduler();
  }
  TSAN(__tsan_acquire(barrier_mark()));
}

void sync_warp(unsigned mask) {
  TSAN(__tsan_release(warp_mark()));
  meet(mask, "syncwarp");
  TSAN(__tsan_acquire(warp_mark()));
}

uint64_t shuffle(unsigned mask, uint64_t value, int source_lane) {
  Warp& warp = warps[self->warp];
  warp.shuffled[self->context.lane] = value;
  meet(mask, "shuffle");
  if (!(mask >> source_lane & 1)) die("a shuffle reads a lane outside its mask");
  const uint64_t result = warp.shuffled[source_lane];
  meet(mask, "shuffle, end");
  return result;
}

// Four independent 8x8x4 products, one per "quad pair" (lanes 4p..4p+3 and 4p+16..4p+19). Layouts: opt_ds/mma_sm70.h.
// With o = (lane % 4) + 4 * (lane / 16): A row-major A[o][e]; B column-major B[e][o]; B row-major B[lane % 4][e + 4 * (lane / 16)].
void mma_m8n8k4(const unsigned* a, const unsigned* b, float* c, bool row_major_b) {
  publish_operands(a, 2, b, 2, row_major_b ? "mma.m8n8k4.row.row" : "mma.m8n8k4.row.col");
  const Warp& warp = warps[self->warp];
  const unsigned lane = self->context.lane, first = lane & 12, high = lane >> 4;
  auto lane_of = [&](unsigned o) { return first + (o & 3) + (o >> 2) * 16; };
  for (unsigned i = 0; i < 8; ++i) {
    const unsigned m = (lane & 1) + (i & 2) + 4 * high, n = (i & 4) + (lane & 2) + (i & 1);
    for (unsigned k = 0; k < 4; ++k) {
      const float y = row_major_b ? half_of(warp.b[lane_of((n & 4) + k)], n & 3) : half_of(warp.b[lane_of(n)], k);
      c[i] += half_of(warp.a[lane_of(m)], k) * y;
    }
  }
  meet(kFullMask, "mma.m8n8k4, end");
}

// One 16x8xk product of the whole warp. With g = lane / 4, t = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
// A register r holds A[g + 8 * (r % 2)][2t, 2t + 1 (+ 8 * (r / 2))]; B register r holds B[2t, 2t + 1 (+ 8 * r)][g];
// C element i is C[g + 8 * (i / 2)][2t + i % 2].
void mma_m16n8(const unsigned* a, const unsigned* b, float* c, int k_total, bool bfloat16) {
  publish_operands(a, k_total / 4, b, k_total / 8, k_total == 16 ? "mma.m16n8k16" : "mma.m16n8k8");
  const Warp& warp = warps[self->warp];
  const unsigned lane = self->context.lane;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned m = lane / 4 + 8 * (i / 2), n = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < k_total; ++k) {
      const unsigned holder_a = m % 8 * 4 + k % 8 / 2, register_a = m / 8 + 2 * (k / 8);
      const unsigned holder_b = n * 4 + k % 8 / 2, register_b = k / 8;
      c[i] += half_of(&warp.a[holder_a][register_a], k & 1, bfloat16) * half_of(&warp.b[holder_b][register_b], k & 1, bfloat16);
    }
  }
  meet(kFullMask, "mma.m16n8, end");
}

// Four 8x8 matrices of 16-bit elements; lane l gets elements (l / 4, 2 * (l % 4)) and the next one in the row, or transposed.
// The lanes read what others point at, so the rows must be visible to the whole warp already.
void ldmatrix_x4(unsigned* registers, const void* row, bool transposed) {
  Warp& warp = warps[self->warp];
  if ((uintptr_t)row % 16) die("an ldmatrix row is not aligned to 16 bytes");
  warp.rows[self->context.lane] = row;
  meet(kFullMask, transposed ? "ldmatrix.trans" : "ldmatrix");
  const unsigned g = self->context.lane / 4, t = self->context.lane % 4;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    auto element = [&](unsigned r, unsigned c) { return (unsigned)((const uint16_t*)warp.rows[8 * matrix + r])[c]; };
    registers[matrix] = transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16 : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
  }
  meet(kFullMask, "ldmatrix, end");
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument) {
  static const unsigned seed = getenv("SIMT_SEED") ? atoi(getenv("SIMT_SEED")) : 1;  // 0: last thread first; 1: first thread first
  static std::mt19937 random(seed);
  static std::mutex one_launch_at_a_time;
  const std::lock_guard<std::mutex> guard(one_launch_at_a_time);
  const unsigned num_threads = block.x * block.y * block.z;
  if (num_threads == 0 || num_threads > 1024) {
    fprintf(stderr, "simt: a block of %u threads\n", num_threads);
    abort();
  }
  TSAN(if (!main_tsan_fiber) main_tsan_fiber = __tsan_get_current_fiber());
  while (fibers.size() < num_threads) {
    Fiber fiber{};
    fiber.stack = (char*)mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TSAN(fiber.tsan_fiber = __tsan_create_fiber(0));
    fibers.push_back(fiber);
  }
  kernel_body = body;
  kernel_argument = argument;
  warps.resize(32);
  // Which thread runs on which stack changes from block to block: the threads of two blocks are different threads to
  // ThreadSanitizer. (A fiber keeps its stack, or its own local arrays would seem to race.)
  std::vector<std::pair<char*, void*>> stacks;
  for (unsigned t = 0; t < num_threads; ++t) stacks.emplace_back(fibers[t].stack, fibers[t].tsan_fiber);
  std::vector<unsigned> order(num_threads);
  std::vector<void*> shared_memories;  // under ThreadSanitizer freed at the end: blocks must not seem to share memory

  unsigned rotation = 0;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x, rotation += 37) {
        ++block_number;
        void* shared = shared_bytes ? aligned_alloc(128, (shared_bytes + 127) / 128 * 128) : nullptr;
        if (shared) memset(shared, 0xff, shared_bytes);
        num_alive = num_threads;
        num_at_barrier = 0;
        memset((void*)warps.data(), 0, warps.size() * sizeof(Warp));
        for (unsigned t = 0; t < num_threads; ++t) {
          Fiber& fiber = fibers[t];
          const dim3 thread(t % block.x, t / block.x % block.y, t / (block.x * block.y));
          fiber.context = Context{thread, dim3(x, y, z), block, grid, t % 32, shared};
          fiber.done = false;
          fiber.warp = t / 32;
          fiber.asan_fake_stack = nullptr;
          std::tie(fiber.stack, fiber.tsan_fiber) = stacks[(t + rotation) % num_threads];
          warps[fiber.warp].alive |= 1u << fiber.context.lane;
          void** top = (void**)(fiber.stack + kStackBytes - 64);
          *--top = nullptr;
          *--top = (void*)fiber_main;
          for (int i = 0; i < 6; ++i) *--top = nullptr;
          fiber.stack_pointer = top;
        }
        TSAN(__tsan_release(&start_mark));
        std::iota(order.begin(), order.end(), 0u);
        if (seed > 1) std::shuffle(order.begin(), order.end(), random);
        if (seed == 0) std::reverse(order.begin(), order.end());
        while (num_alive) {
          const uint64_t before = progress;
          for (unsigned t : order)
            if (!fibers[t].done) resume(&fibers[t]);
          if (before == progress && num_alive) die("deadlock: threads wait at a barrier or warp operation that others never reach");
        }
#ifdef SIMT_TSAN
        shared_memories.push_back(shared);
#else
        free(shared);
#endif
      }
  TSAN(__tsan_acquire(&end_mark));
  for (void* shared : shared_memories) free(shared);
}

}  // namespace simt

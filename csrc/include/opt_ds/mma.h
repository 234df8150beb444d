// Mma<T, head size>: the tensor-core instructions of the architecture being compiled, for element type T.
#pragma once
#include "opt_ds/launch.h"
#include "opt_ds/mma_sm70.h"
#include "opt_ds/mma_sm75.h"

namespace opt_ds {

// The architecture has no instruction for the type. The launchers never ask for such a kernel (tensor_cores_take); if one runs all
// the same, it must end with an error rather than leave its outputs unwritten.
struct NoMma { static constexpr bool kSupported = false; };
__device__ __forceinline__ void stop_without_mma() { __trap(); }
template <class T, int kHeadSize> struct MmaOf { using Type = NoMma; };

#if defined(__CUDA_ARCH__)
#define OPT_DS_ARCH (__CUDA_ARCH__ / 10)
#else
#define OPT_DS_ARCH OPT_DS_EMULATED_ARCH  // and nvcc's host pass, which makes no code of it
#endif

#if OPT_DS_ARCH >= 80
template <int kHeadSize> struct MmaOf<half, kHeadSize> { using Type = MmaSm75<half, kHeadSize, 16>; };
template <int kHeadSize> struct MmaOf<bfloat16, kHeadSize> { using Type = MmaSm75<bfloat16, kHeadSize, 16>; };
#elif OPT_DS_ARCH >= 75
template <int kHeadSize> struct MmaOf<half, kHeadSize> { using Type = MmaSm75<half, kHeadSize, 8>; };
#else
template <int kHeadSize> struct MmaOf<half, kHeadSize> { using Type = MmaSm70<kHeadSize>; };
#endif

template <class T, int kHeadSize> using Mma = typename MmaOf<T, kHeadSize>::Type;

}  // namespace opt_ds

// Mma<T>: the tensor-core instructions of the architecture being compiled, for element type T.
#pragma once
#include "opt_ds/launch.h"
#include "opt_ds/mma_sm70.h"
#include "opt_ds/mma_sm75.h"

namespace opt_ds {

struct NoMma { static constexpr bool kSupported = false; };
template <class T> struct MmaOf { using Type = NoMma; };

#if defined(__CUDA_ARCH__)
#define OPT_DS_ARCH (__CUDA_ARCH__ / 10)
#else
#define OPT_DS_ARCH OPT_DS_EMULATED_ARCH  // and nvcc's host pass, which makes no code of it
#endif

#if OPT_DS_ARCH >= 80
template <> struct MmaOf<half> { using Type = MmaSm75<half, 16>; };
template <> struct MmaOf<bfloat16> { using Type = MmaSm75<bfloat16, 16>; };
#elif OPT_DS_ARCH >= 75
template <> struct MmaOf<half> { using Type = MmaSm75<half, 8>; };
#else
template <> struct MmaOf<half> { using Type = MmaSm70; };
#endif

template <class T> using Mma = typename MmaOf<T>::Type;

}  // namespace opt_ds

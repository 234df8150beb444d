// CUDA's qualifiers where no CUDA compiler defines them, so that host code (the CPU operators, the emulator) reads the same headers.
#pragma once
#ifndef __CUDACC__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#endif

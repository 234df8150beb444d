// What the launchers share. Host code: NVRTC, which compiles kernels alone, skips it.
#pragma once
#include "opt_ds/device.h"
#include "opt_ds/dropout.h"
#include "opt_ds/launchers.h"

#ifndef __CUDACC_RTC__
namespace opt_ds {

// Calls f(element) with a value of the element type.
template <class Function>
int with_type(int type, Function&& f) {
  if (type == kOptDsFloat32) return f(float());
  if (type == kOptDsFloat16) return f(half());
  if (type == kOptDsBFloat16) return f(bfloat16());
  return -1;
}

inline Dropout make_dropout(const OptDsDropout& d) { return make_dropout(d.probability, d.key, d.layer_id); }

inline bool aligned16(const void* p) { return (unsigned long long)p % 16 == 0; }

inline int last_error() {
#ifdef __CUDACC__
  return (int)cudaGetLastError();
#else
  return 0;
#endif
}

// The architecture that the code of a launch was compiled for (__CUDA_ARCH__ / 10): 70, 75, 80, 90, ... It is at most the device's
// own: the driver also translates PTX of an older architecture, whose kernels lack what the newer chip has. See about.cu.
int compiled_architecture();

inline int num_multiprocessors() {
#ifdef __CUDACC__
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
#else
  return 3;
#endif
}

}  // namespace opt_ds
#endif

// What this build is: the names of errors, the architectures that it was compiled for, and the one that a device runs.
#ifndef __CUDACC_RTC__
#include <atomic>
#endif

#include "opt_ds/launch.h"

#ifndef __CUDACC_RTC__
#ifndef OPT_DS_ARCHITECTURES
#define OPT_DS_ARCHITECTURES "unknown"
#endif
extern "C" const char* opt_ds_architectures(void) { return OPT_DS_ARCHITECTURES; }

extern "C" const char* opt_ds_error_name(int error) {
  if (error == -1) return "no kernel for this type or shape";
#ifdef __CUDACC__
  return cudaGetErrorString((cudaError_t)error);
#else
  return "unknown";
#endif
}

namespace opt_ds {

#ifdef __CUDACC__
// All kernel files are compiled for the same architectures, so that the driver picks the same one for this kernel as for the others.
__global__ void probe() {}

static int architecture_of_probe() {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, probe) == cudaSuccess) return attributes.ptxVersion;
  cudaGetLastError();  // no code for this device: the launch itself reports that
  return 0;
}

int compiled_architecture() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 0: not asked yet
  int device = 0;
  cudaGetDevice(&device);
  if (device >= kDevices) return architecture_of_probe();
  if (!known[device]) known[device] = architecture_of_probe();
  return known[device];
}
#else
int compiled_architecture() { return OPT_DS_EMULATED_ARCH; }
#endif

}  // namespace opt_ds
#endif

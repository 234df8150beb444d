// What this build is: the names of errors, and the architectures that it was compiled for.
#include "opt_ds/device.h"
#include "opt_ds/launchers.h"

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
#endif

// What the runtime says of this machine.
#include <cuda_runtime.h>

#include "launch.h"

namespace tokdyn::cuda {

int device_count(int* count) { return cudaGetDeviceCount(count); }
const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace tokdyn::cuda

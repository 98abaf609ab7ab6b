// The backend of the plugins: the CUDA kernels, or in the test build the CPU twins with the same signatures.
#pragma once

#ifdef VTEXPORT_PLUGINS_ON_CPU
#include "tensorrt/cpu_backend.h"
namespace vtexport {
namespace backend = cpu_backend;
}
#else
#include "cuda/kernels.h"
namespace vtexport {
namespace backend = cuda;
}
#endif

// What this machine says of this object: the driver's version, that of the runtime inside it, and
// the error of a look at a kernel, which is loaded for it and not launched.
#include <cuda_runtime_api.h>

namespace {

__global__ void probe_kernel() {}

}  // namespace

// Of the current device. Versions are 1000 * major + 10 * minor; of no driver, 0.
extern "C" __attribute__((visibility("default"))) const char* fluxkern_probe(int* driver,
                                                                             int* runtime) {
    *driver = *runtime = 0;
    cudaError_t error = cudaDriverGetVersion(driver);
    if (error == cudaSuccess) error = cudaRuntimeGetVersion(runtime);
    cudaFuncAttributes attributes;
    const void* const kernel = reinterpret_cast<const void*>(&probe_kernel);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    cudaGetLastError();  // the next launch is not to find it
    return cudaGetErrorName(error);
}

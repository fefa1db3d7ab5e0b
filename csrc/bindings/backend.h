// The backend of the object: `kernels`, and run(x, launch), which calls launch(const
// kernels::Context&) for the device of x and raises when the launch fails.
#pragma once

#if defined(USE_CUDA) || defined(FLUXKERN_EMULATOR)
#include "cuda_backend.h"
#else
#include "cpu_backend.h"
#endif

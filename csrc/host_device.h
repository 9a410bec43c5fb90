// Functions that a kernel may call too.
#pragma once

#ifdef __CUDACC__
#define CONVBN_HOST_DEVICE __host__ __device__
#else
#define CONVBN_HOST_DEVICE
#endif

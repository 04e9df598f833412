// What CUTLASS's headers want of a CUDA compiler and of its driver, for a C++ compiler that has neither.
#pragma once
#define LOWBIT_HOST
#include <cuda.h>
#include <cuda_runtime.h>
#include <cstdint>
#include <cstring>
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
char shared[16];
inline void __syncthreads() {}
inline void __syncwarp(unsigned = ~0u) {}
inline int __syncthreads_and(int) { return 0; }
#define __cluster_dims__(...)
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

// Aligned as NVRTC's is; the driver's header of CUDA 13 asks for more.
struct alignas(64) NarrowTensorMap {
    std::uint64_t opaque[16];
};
#define CUtensorMap NarrowTensorMap

// A descriptor that says in plain numbers what it was made of.
struct Recorded {
    std::uint64_t address, sizes[5], strides[4];
    std::uint16_t box[5];
    std::uint8_t kind, rank, swizzle, others;
};
static_assert(sizeof(Recorded) <= 128);

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType kind, cuuint32_t rank, void* address,
                                                   const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                                   const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                                   CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                                   CUtensorMapFloatOOBfill fill) {
    Recorded r{};
    r.address = reinterpret_cast<std::uint64_t>(address);
    r.kind = kind, r.rank = rank, r.swizzle = swizzle;
    r.others = interleave == 0 && promotion == CU_TENSOR_MAP_L2_PROMOTION_L2_128B && fill == 0;
    for (unsigned i = 0; i < rank; ++i) {
        r.sizes[i] = sizes[i], r.box[i] = box[i];
        r.others &= steps[i] == 1;
        if (i) r.strides[i - 1] = strides[i - 1];
    }
    std::memset(map, 0, sizeof *map);
    std::memcpy(map, &r, sizeof r);
    return CUDA_SUCCESS;
}
extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }
extern "C" cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 132, cudaSuccess; }
extern "C" cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }

#define __CUDA_ARCH__ 0  // no wmma
#include "cutlass/arch/wmma.h"
#undef __CUDA_ARCH__
namespace cutlass::arch {
inline int SmId() { return 0; }
inline int LaneId() { return 0; }
}  // namespace cutlass::arch

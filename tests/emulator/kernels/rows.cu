// Each block adds a row to its sum and its largest size; the last block adds the rows' sums up.
#include "primitives.cuh"

__global__ void __launch_bounds__(128)
rows(const float* __restrict__ x, float* __restrict__ largest, float* __restrict__ sums, int* __restrict__ arrived,
     float* __restrict__ total, int columns) {
    auto& partial = lb::static_shared<float[4], 1>();
    auto& ticket = lb::static_shared<int>();
    const float* row = x + size_t(blockIdx.x) * columns;
    float size = 0, sum = 0;
    for (int i = threadIdx.x; i < columns; i += 128) size = fmaxf(size, fabsf(row[i])), sum += row[i];
    size = lb::block_max<128>(size);
    sum = lb::warp_sum(sum);
    if (lb::lane() == 0) partial[lb::warp()] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        largest[blockIdx.x] = size;
        sums[blockIdx.x] = partial[0] + partial[1] + partial[2] + partial[3];
        __threadfence();
        ticket = atomicAdd(arrived, 1);
    }
    __syncthreads();
    if (ticket != int(gridDim.x) - 1) return;
    __threadfence();
    if (threadIdx.x == 0) {
        float all = 0;
        for (int b = 0; b < int(gridDim.x); ++b) all += static_cast<volatile float*>(sums)[b];
        *total = all;
    }
}

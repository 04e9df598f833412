// Sums of the codes of every row, which zero points of the other operand are multiplied by.
#pragma once
#include "primitives.cuh"

namespace lb {

// A warp for each row.
template <class T>
__global__ void row_sums(const T* __restrict__ codes, long long pitch, int columns, int rows, int* __restrict__ sums) {
    const int row = int(blockIdx.x * (blockDim.x / 32) + warp());
    if (row >= rows) return;
    int sum = 0;
    for (int c = int(lane()); c < columns; c += 32) sum += codes[row * pitch + c];
#pragma unroll
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane() == 0) sums[row] = sum;
}

}  // namespace lb

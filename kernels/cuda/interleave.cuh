// Scales of blocks in the order in which tensor cores take them: 128 rows and 4 columns are 512 bytes.
#pragma once
#include "primitives.cuh"

namespace lb {

// A thread for the four scales of a row that lie together; row r of its 128 is at 16 (r mod 32) + 4 (r div 32).
__global__ void interleave(const unsigned char* __restrict__ scales, long long pitch, int rows, int columns,
                           unsigned* __restrict__ found) {
    const int across = (columns + 3) / 4, down = (rows + 127) / 128;
    const long long word = (long long)blockIdx.x * blockDim.x + threadIdx.x, atom = word / 128;
    if (atom >= (long long)down * across) return;
    const int at = int(word % 128), first = int(atom % across) * 4;
    const int row = int(atom / across) * 128 + at / 4 + 32 * (at % 4);
    unsigned four = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (row < rows && first + i < columns) four |= unsigned(scales[row * pitch + first + i]) << (8 * i);
    found[word] = four;
}

}  // namespace lb

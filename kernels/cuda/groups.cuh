// Where the matrices of every group of rows lie, written on the GPU, as a grouped product reads it:
// no number of rows has to come back to the host.
#pragma once
#include "primitives.cuh"

namespace lb {

using Address = unsigned long long;

// Eight columns of `groups` numbers: addresses of w's matrices, of x's rows, of the result's and of
// x's scales; how far apart rows of w, x (bytes) and the result (numbers) are; sizes of the product.
// `rows` are where groups end, of `total` rows, or, if each has room for `most`, how many it has. What
// they say wrongly reaches no other memory: nobody on the host has seen them.
template <bool turned, class Count>
__global__ void groups(const Count* __restrict__ rows, int count, int most, int total, int n, int k, Address w, long long w_pitch,
                       long long w_distance, Address x, long long x_pitch, Address out, long long out_pitch, int out_size,
                       Address scales, int scales_pitch, Address* __restrict__ table) {
    const long long group = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (group >= count) return;
    const auto within = [](long long number, long long limit) { return number < 0 ? 0 : number < limit ? number : limit; };
    const long long before = most ? group * most : group ? within(rows[group - 1], total) : 0;
    const int m = int(most ? within(rows[group], most) : within(rows[group] - before, total - before));
    const Address columns[7] = {w + group * w_distance, x + before * x_pitch, out + before * out_pitch, scales + before * scales_pitch,
                                Address(w_pitch), Address(x_pitch), Address(out_pitch / out_size)};
#pragma unroll
    for (int i = 0; i < 7; ++i) table[i * (long long)count + group] = columns[i];
    int* sizes = reinterpret_cast<int*>(table + 7 * (long long)count) + 3 * group;
    sizes[0] = turned ? n : m, sizes[1] = turned ? m : n, sizes[2] = k;
}

}  // namespace lb

// Hopper's primitives at work: wgmma on tiles written by threads, and the whole chain that feeds it by TMA.
#include "sm90.cuh"

// Shared memory of a K-major tile of 64 numbers a row: 16-byte chunk c of row r lies at c ^ r % 8.
template <int Rows> struct alignas(1024) Tile {
    uint4 chunk[Rows][8];
};

// d[64, N] += a[64, 64] b[N, 64]^T; threads give a as tiles, or as registers [step][thread][4].
template <class T, int N, bool FromRegisters>
__global__ void __launch_bounds__(128)
multiply(const uint4* __restrict__ a, const lb::u32* __restrict__ a_registers, const uint4* __restrict__ b, float* __restrict__ d) {
    struct Shared { Tile<64> a; Tile<N> b; };
    auto& shared = lb::dynamic_shared<Shared>();
    const int t = threadIdx.x;
    for (int i = t; i < 64 * 8; i += 128) shared.a.chunk[i / 8][i % 8 ^ i / 8 % 8] = a[i];
    for (int i = t; i < N * 8; i += 128) shared.b.chunk[i / 8][i % 8 ^ i / 8 % 8] = b[i];
    lb::fence_proxy_async();
    __syncthreads();
    float sum[N / 2];
    lb::u32 registers[4][4];
    for (int i = 0; i < N / 2; ++i) sum[i] = d[t * (N / 2) + i];
    for (int step = 0; step < 4; ++step)
        for (int i = 0; i < 4; ++i) registers[step][i] = a_registers[(step * 128 + t) * 4 + i];
    lb::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const lb::u64 right = lb::descriptor_sw128(&shared.b) + 2 * step;
        if constexpr (FromRegisters) lb::wgmma<N, T>(sum, registers[step], right);
        else lb::wgmma<N, T>(sum, lb::descriptor_sw128(&shared.a) + 2 * step, right);
    }
    lb::wgmma_commit();
    lb::wgmma_wait<0>(sum);
    for (int i = 0; i < N / 2; ++i) d[t * (N / 2) + i] = sum[i];
}

// c[M, N] = a[M, K] b[N, K]^T: a producer warp feeds a warpgroup through a ring of stages.
template <int Stages> struct Ring {
    Tile<64> a[Stages], b[Stages];
    lb::Mbarrier full[Stages], empty[Stages];
};

template <int Stages>
__global__ void __launch_bounds__(160)
gemm_sm90(const __grid_constant__ lb::TensorMap a, const __grid_constant__ lb::TensorMap b, __half* __restrict__ C, int M, int N, int K) {
    auto& shared = lb::dynamic_shared<Ring<Stages>>();
    const int m0 = blockIdx.x * 64, n0 = blockIdx.y * 64, tiles = (K + 63) / 64, lane = lb::lane();
    if (threadIdx.x == 0) {
        for (int s = 0; s < Stages; ++s) {
            lb::mbarrier_init(&shared.full[s], 1);
            lb::mbarrier_init(&shared.empty[s], 128);
        }
        lb::mbarrier_fence_init();
    }
    __syncthreads();
    if (lb::warp() == 4) {
        if (lane == 0)
            for (int tile = 0; tile < tiles; ++tile) {
                const int s = tile % Stages, phase = tile / Stages & 1;
                lb::mbarrier_wait(&shared.empty[s], phase ^ 1);
                lb::mbarrier_arrive_expect(&shared.full[s], 2 * 64 * 128);
                lb::tma_load_2d(&shared.a[s], &a, tile * 64, m0, &shared.full[s]);
                lb::tma_load_2d(&shared.b[s], &b, tile * 64, n0, &shared.full[s]);
            }
        return;
    }
    float acc[32] = {};
    for (int tile = 0; tile < tiles; ++tile) {
        const int s = tile % Stages, phase = tile / Stages & 1;
        lb::mbarrier_wait(&shared.full[s], phase);
        lb::wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k)
            lb::wgmma<64, __half>(acc, lb::descriptor_sw128(&shared.a[s]) + 2 * k, lb::descriptor_sw128(&shared.b[s]) + 2 * k);
        lb::wgmma_commit();
        lb::wgmma_wait<0>(acc);
        lb::mbarrier_arrive(&shared.empty[s]);
    }
    for (int j = 0; j < 8; ++j)
        for (int half = 0; half < 2; ++half) {
            const int m = m0 + int(lb::warp()) * 16 + half * 8 + lane / 4, n = n0 + j * 8 + lane % 4 * 2;
            for (int i = 0; i < 2; ++i)
                if (m < M && n + i < N) C[size_t(m) * N + n + i] = __float2half(acc[j * 4 + half * 2 + i]);
        }
}

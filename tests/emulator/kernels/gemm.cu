// C[M, N] = A[M, K] B[N, K]^T in half by tensor cores: a pipeline with everything that can go wrong in one.
// Four warps as 2 x 2, each with 16 x 16 of C; columns of tiles are swizzled for ldmatrix.
#include "primitives.cuh"

template <int Stages> struct GemmShared {
    uint4 a[Stages][32][8], b[Stages][32][8];  // eight halves an element; column c of row r lies at c ^ r % 8
};

template <int Stages>
__global__ void __launch_bounds__(128)
gemm(const __half* __restrict__ A, const __half* __restrict__ B, float* __restrict__ C, int M, int N, int K) {
    auto& shared = lb::dynamic_shared<GemmShared<Stages>>();
    const int lane = lb::lane(), wm = lb::warp() % 2 * 16, wn = lb::warp() / 2 * 16;
    const int m0 = blockIdx.x * 32, n0 = blockIdx.y * 32, tiles = (K + 63) / 64;
    auto load_rows = [&](uint4 (&tile)[32][8], const __half* from, int first, int rows, int k) {
        for (int i = threadIdx.x; i < 32 * 8; i += 128) {
            const int r = i / 8, c = i % 8;
            const bool inside = first + r < rows && k + c * 8 < K;  // K is a multiple of 8
            const __half* at = from + (inside ? size_t(first + r) * K + k + c * 8 : 0);
            lb::cp_async<16>(&tile[r][c ^ (r % 8)], at, inside ? 16 : 0);
        }
    };
    auto load = [&](int stage, int tile) {
        load_rows(shared.a[stage], A, m0, M, tile * 64);
        load_rows(shared.b[stage], B, n0, N, tile * 64);
    };
    float acc[2][4] = {};
    for (int s = 0; s < Stages - 1; ++s) {
        if (s < tiles) load(s, s);
        lb::cp_async_commit();
    }
    for (int tile = 0; tile < tiles; ++tile) {
        lb::cp_async_wait<Stages - 2>();
        __syncthreads();
        const int next = tile + Stages - 1, stage = tile % Stages;
        if (next < tiles) load(next % Stages, next);
        lb::cp_async_commit();
        for (int step = 0; step < 4; ++step) {
            lb::u32 a[4], b[4];
            const int ar = wm + lane % 16, ac = step * 2 + lane / 16;
            const int br = wn + lane % 8 + lane / 16 * 8, bc = step * 2 + lane / 8 % 2;
            lb::ldmatrix_x4(a, &shared.a[stage][ar][ac ^ (ar % 8)]);
            lb::ldmatrix_x4(b, &shared.b[stage][br][bc ^ (br % 8)]);
            for (int j = 0; j < 2; ++j) {
                const lb::u32 pair[2] = {b[2 * j], b[2 * j + 1]};
                lb::mma_m16n8k16_f16(acc[j], a, pair);
            }
        }
    }
    lb::cp_async_wait<0>();
    for (int j = 0; j < 2; ++j)
        for (int i = 0; i < 4; ++i) {
            const int m = m0 + wm + i / 2 * 8 + lane / 4, n = n0 + wn + j * 8 + lane % 4 * 2 + i % 2;
            if (m < M && n < N) C[size_t(m) * N + n] = acc[j][i];
        }
}

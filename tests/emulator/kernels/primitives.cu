// One warp runs one primitive on given registers: the conformance test of the primitives.
#include "primitives.cuh"

#define MMA(NAME, SUM)                                                                                  \
    struct NAME {                                                                                       \
        using Sum = SUM;                                                                                \
        static LB_DEV void run(SUM (&c)[4], const lb::u32 (&a)[4], const lb::u32 (&b)[2]) { lb::mma_##NAME(c, a, b); } \
    };
MMA(m16n8k16_f16, float)
MMA(m16n8k16_bf16, float)
MMA(m16n8k32_s8, int)
MMA(m16n8k32_u8s8, int)
MMA(m16n8k32_s8u8, int)
#if defined(LOWBIT_EMU) || __CUDA_ARCH__ >= 890
MMA(m16n8k32_e4m3, float)
MMA(m16n8k32_e5m2, float)
MMA(m16n8k32_e4m3e5m2, float)
MMA(m16n8k32_e5m2e4m3, float)
#endif

template <class Mma>
__global__ void mma(const unsigned* __restrict__ a, const unsigned* __restrict__ b, typename Mma::Sum* __restrict__ c) {
    const unsigned t = threadIdx.x;
    const unsigned ra[4] = {a[t * 4], a[t * 4 + 1], a[t * 4 + 2], a[t * 4 + 3]}, rb[2] = {b[t * 2], b[t * 2 + 1]};
    typename Mma::Sum rc[4];
    for (int i = 0; i < 4; ++i) rc[i] = c[t * 4 + i];
    Mma::run(rc, ra, rb);
    for (int i = 0; i < 4; ++i) c[t * 4 + i] = rc[i];
}

template <int Matrices, bool Transpose>
__global__ void ldmatrix(const uint4* __restrict__ in, unsigned* __restrict__ out) {
    auto& rows = lb::static_shared<uint4[8 * Matrices]>();
    const unsigned t = threadIdx.x;
    if (t < 8 * Matrices) rows[t] = in[t];
    __syncwarp();
    unsigned r[Matrices];
    const void* row = &rows[t % (8 * Matrices)];
    if constexpr (Matrices == 2 && Transpose) lb::ldmatrix_x2_trans(r, row);
    else if constexpr (Matrices == 2) lb::ldmatrix_x2(r, row);
    else if constexpr (Transpose) lb::ldmatrix_x4_trans(r, row);
    else lb::ldmatrix_x4(r, row);
    for (int i = 0; i < Matrices; ++i) out[t * Matrices + i] = r[i];
}

// Lane t copies the first t bytes of its piece, at most all.
template <int Bytes>
__global__ void cp_async(const lb::u8* __restrict__ in, lb::u8* __restrict__ out) {
    struct Pieces { alignas(16) lb::u8 bytes[32][Bytes]; };
    auto& pieces = lb::static_shared<Pieces>();
    const unsigned t = threadIdx.x;
    lb::cp_async<Bytes>(pieces.bytes[t], in + t * Bytes, min(t, unsigned(Bytes)));
    lb::cp_async_commit();
    lb::cp_async_wait<0>();
    __syncwarp();
    for (int i = 0; i < Bytes; ++i) out[t * Bytes + i] = pieces.bytes[31 - t][i];
}

// Two groups a lane; the older one has come when at most one is under way.
__global__ void cp_async_groups(const unsigned* __restrict__ in, unsigned* __restrict__ out) {
    auto& words = lb::static_shared<unsigned[2][32]>();
    const unsigned t = threadIdx.x;
    for (int group = 0; group < 2; ++group) {
        lb::cp_async<4>(&words[group][t], in + group * 32 + t, 4);
        lb::cp_async_commit();
    }
    lb::cp_async_wait<1>();
    out[t] = words[0][t];
    lb::cp_async_wait<0>();
    out[32 + t] = words[1][t];
}

template <class T>
__global__ void load_once(const T* __restrict__ in, T* __restrict__ out) {
    out[threadIdx.x] = lb::load_once<T>(in + threadIdx.x);
}
__global__ void stores(const unsigned* __restrict__ in, unsigned* __restrict__ out) {
    const unsigned t = threadIdx.x, *v = in + t * 7;
    lb::store4(out + t * 8, v[0]);
    lb::store8(out + t * 8 + 2, make_uint2(v[1], v[2]));
    lb::store16(out + t * 8 + 4, make_uint4(v[3], v[4], v[5], v[6]));
}

template <unsigned Table>
__global__ void lop3(const unsigned* __restrict__ in, unsigned* __restrict__ out) {
    const unsigned* v = in + threadIdx.x * 3;
    out[threadIdx.x] = lb::lop3<Table>(v[0], v[1], v[2]);
}
__global__ void bits(const unsigned* __restrict__ in, unsigned* __restrict__ out) {
    const unsigned t = threadIdx.x, a = in[t * 3], b = in[t * 3 + 1], c = in[t * 3 + 2];
    unsigned* to = out + t * 12;
    to[0] = __byte_perm(a, b, c & 0x7777);
    to[1] = unsigned(__dp4a(int(a), int(b), int(c)));
    to[2] = __funnelshift_r(a, b, c);
    to[3] = __funnelshift_l(a, b, c);
    to[4] = unsigned(__popc(a) + 100 * __clz(int(b)) + 10000 * __ffs(int(c)));
    to[5] = __brev(a);
    to[6] = __shfl_xor_sync(~0u, a, 5);
    to[7] = __shfl_down_sync(~0u, a, 3, 8);
    to[8] = __shfl_up_sync(~0u, a, 3, 16);
    to[9] = __shfl_sync(~0u, a, int(b), 16);
    to[10] = __ballot_sync(~0u, int(a & 1));
    to[11] = unsigned(__any_sync(~0u, t == 7) + 2 * __all_sync(~0u, t < 31));
}

__global__ void fma_f16(const __half2* __restrict__ in, __half2* __restrict__ out, int n) {
    for (int i = threadIdx.x; i < n; i += 32) out[i] = lb::hfma2(in[i * 3], in[i * 3 + 1], in[i * 3 + 2]);
}
__global__ void fma_bf16(const __nv_bfloat162* __restrict__ in, __nv_bfloat162* __restrict__ out, int n) {
    for (int i = threadIdx.x; i < n; i += 32) out[i] = lb::bfma2(in[i * 3], in[i * 3 + 1], in[i * 3 + 2]);
}
// All codes c, in pairs (c, 255 - c).
__global__ void fp8(__half2* __restrict__ e4m3, __half2* __restrict__ e5m2) {
    for (unsigned c = threadIdx.x; c < 256; c += 32) {
        const unsigned pair = c | (255 - c) << 8;
        e4m3[c] = lb::e4m3_to_half2(pair), e5m2[c] = lb::e5m2_to_half2(pair);
    }
}
__global__ void conversions(const float* __restrict__ in, int* __restrict__ out, int n) {
    for (int i = threadIdx.x; i < n; i += 32) {
        out[i * 4] = __float2int_rn(in[i]);
        out[i * 4 + 1] = __float2int_rz(in[i]);
        out[i * 4 + 2] = int(__float2uint_rn(in[i]));
        out[i * 4 + 3] = __double2int_rn(in[i]);
    }
}

// Blocks draw tickets; the last one adds what the others wrote.
__global__ void last_block(const int* __restrict__ in, int* __restrict__ partial, int* __restrict__ arrived, int* __restrict__ out) {
    partial[blockIdx.x * 32 + threadIdx.x] = in[blockIdx.x * 32 + threadIdx.x];
    int& ticket = lb::static_shared<int>();
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) ticket = atomicAdd(arrived, 1);
    __syncthreads();
    if (ticket != int(gridDim.x) - 1) return;
    __threadfence();
    int sum = 0;
    for (int b = 0; b < int(gridDim.x); ++b) sum += static_cast<volatile int*>(partial)[b * 32 + threadIdx.x];
    out[threadIdx.x] = sum;
}
// Warp 1 waits for what warp 0 says.
__global__ void flags(unsigned* __restrict__ flag, unsigned* __restrict__ data, unsigned* __restrict__ out) {
    if (lb::warp() == 0) {
        data[lb::lane()] = 3 * lb::lane() + 1;
        __syncwarp();
        if (lb::lane() == 0) {
            __threadfence();
            lb::store_release(flag, 7);
        }
    } else {
        while (lb::load_acquire(flag) != 7) {}
        out[lb::lane()] = static_cast<volatile unsigned*>(data)[31 - lb::lane()];
    }
}

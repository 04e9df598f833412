// From a tile of sums in shared memory to the result, a warp writing columns that lie side by side; before that,
// where blocks share the columns of a tile, their sums are added up in ascending order by the last to arrive.
#pragma once
#include "epilogue.cuh"

namespace lb {

// Past the first-level cache, which does not see what other multiprocessors write.
template <class T> LB_DEV T load_through(const T* p) { return *static_cast<const volatile T*>(p); }

template <int Rows, int Columns> struct ResultTile {  // of w, of x
    u32 sum[Columns][Rows + 4];                        // so far apart that lanes write to different banks
};

// What all threads of a block that work on results know.
template <class C, class Sum, int Rows, int Columns> struct Results {
    ResultTile<Rows, Columns>& tile;
    int& ticket;  // in shared memory
    int M, N, m0, n0, warp, warps;
    Sum* partial;  // [share][M][N]
    int* arrived;  // [tile], zero between launches

    // `sync` is a barrier of these threads; scaled(total, m, n) is what a sum of shares stands for.
    template <class Sync, class Scaled> LB_DEV void leave(Sync sync, Scaled scaled, const Finish<C>& finish) const {
        sync();
        if constexpr (C::shared) {
            each([&](int m, int n) { partial[blockIdx.z * size() + place(m, n)] = bits<Sum>(tile.sum[m][n]); });
            __threadfence();
            sync();
            int& counter = arrived[blockIdx.y * gridDim.x + blockIdx.x];
            if (warp == 0 && lane() == 0) ticket = atomicAdd(&counter, 1);
            sync();
            if (ticket != int(gridDim.z) - 1) return;
            __threadfence();
            if (warp == 0 && lane() == 0) atomicExch(&counter, 0);  // for the next launch
        }
        each([&](int m, int n) {
            if constexpr (C::shared) {
                Sum total = 0;
#pragma unroll 1
                for (int z = 0; z < int(gridDim.z); ++z) total += load_through(&partial[z * size() + place(m, n)]);
                finish(m0 + m, n0 + n, scaled(total, m0 + m, n0 + n));
            } else {
                finish(m0 + m, n0 + n, bits<float>(tile.sum[m][n]));
            }
        });
    }

  private:
    LB_DEV long long size() const { return (long long)M * N; }
    LB_DEV long long place(int m, int n) const { return (long long)(m0 + m) * N + n0 + n; }
    template <class Use> LB_DEV void each(Use use) const {
#pragma unroll 1
        for (int m = warp; m < min(Columns, M - m0); m += warps)
#pragma unroll
            for (int n = int(lane()); n < Rows; n += 32)
                if (n0 + n < N) use(m, n);
    }
};

// Stages of a block: all of them, or its share.
template <class C> struct Share {
    int begin, end;
    LB_DEV explicit Share(int stages) {
        const int each = C::shared ? (stages + int(gridDim.z) - 1) / int(gridDim.z) : stages;
        begin = C::shared ? int(blockIdx.z) * each : 0, end = min(stages, begin + each);
    }
};

}  // namespace lb

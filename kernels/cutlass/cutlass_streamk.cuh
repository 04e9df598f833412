// CUTLASS's stream-K scheduler with locks of its own, which a kernel finds and leaves at zero: they
// then need no memset before a launch. Sums are added up in the order of the columns.
#pragma once
#include "cutlass_gemm.cuh"

namespace lb {

template <class Tile, class Cluster>
struct Sharing : cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamK<Tile, Cluster> {
    using Base = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90StreamK<Tile, Cluster>;
    using Work = typename Base::WorkTileInfo;
    struct Arguments : Base::Arguments {
        int* locks = nullptr;  // one for every tile that holds partial sums, and warp group
    };
    struct Params : Base::Params {
        int* locks = nullptr;
    };

    template <class Shape>
    static Params to_underlying_arguments(Shape shape, Tile tile, Cluster cluster, const cutlass::KernelHardwareInfo& hardware,
                                          const Arguments& given, void* partial, uint32_t subtiles = 1) {
        Params made;
        static_cast<typename Base::Params&>(made) =
            Base::to_underlying_arguments(shape, tile, cluster, hardware, given, partial, subtiles);
        made.locks = given.locks;
        return made;
    }

    CUTLASS_DEVICE Sharing(const Params& params) : Base(params) {}

    // A lock counts the steps whose sums are in: each block waits for those before its own. The
    // last one, which nobody waits for, puts it back to zero.
    template <class Sums>
    CUTLASS_DEVICE static void fixup(const Params& params, const Work& work, Sums& sums, uint32_t groups, uint32_t group) {
        if (!Base::requires_fixup(params, work)) return;
        constexpr int threads = cutlass::NumThreadsPerWarpGroup;
        using Lock = cutlass::NamedBarrierManager<threads, static_cast<int>(cutlass::arch::ReservedNamedBarriers::StreamkBarrier0), 2>;
        using Numbers = cutlass::Array<typename Sums::value_type, cute::size(Sums{})>;
        using Striped = cutlass::BlockStripedReduce<threads, Numbers>;
        const int thread = threadIdx.x % threads;
        const uint64_t place = Base::output_tile_index(params, work) * groups + group;
        Numbers* partial = static_cast<Numbers*>(params.reduction_workspace_) + place * threads;
        Numbers& own = *reinterpret_cast<Numbers*>(sums.data());
        if (work.K_idx > 0) Lock::wait_eq(group, params.locks, thread, place, work.K_idx);
        if (Base::compute_epilogue(work, params)) {
            Striped::load_add(own, partial, thread);
            if (thread == 0) params.locks[place] = 0;
            return;
        }
        if (work.K_idx > 0) Striped::reduce(partial, own, thread);
        else Striped::store(partial, own, thread);
        Lock::arrive_inc(group, params.locks, thread, place, work.k_tile_count);
    }
};

struct StreamK {};

}  // namespace lb

namespace cutlass::gemm::kernel::detail {
template <class Tile, class Cluster, uint32_t stages>
struct TileSchedulerSelector<lb::StreamK, arch::Sm90, Tile, Cluster, stages> {
    using Scheduler = lb::Sharing<Tile, Cluster>;
};
}  // namespace cutlass::gemm::kernel::detail

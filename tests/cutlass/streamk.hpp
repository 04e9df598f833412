// CUTLASS's own arguments of a kernel whose blocks share columns, and the work that it makes of them.
#pragma once
#define BESIDE(a, numbers)                                                                                     \
    a.scheduler.decomposition_mode = static_cast<decltype(a.scheduler.decomposition_mode)>(numbers[0]);        \
    a.scheduler.splits = numbers[1], a.scheduler.locks = reinterpret_cast<int*>(numbers[3])
#define WORKSPACE(numbers) reinterpret_cast<void*>(numbers[2])
#include "dense.hpp"

struct Work {
    int m, n, k, l, count, tile, last;
};

// What one block computes, piece after piece.
extern "C" int works(const typename Kernel::Params& params, const unsigned* grid, const unsigned* block, Work* found) {
    using Scheduler = typename Kernel::TileScheduler;
    const auto& p = params.scheduler;
    const bool along_n = p.raster_order_ == Scheduler::RasterOrder::AlongN;
    const dim3 inside{block[0] % cute::size<0>(Cluster{}), block[1] % cute::size<1>(Cluster{}), 0};
    int count = 0;
    for (std::uint64_t i = along_n ? block[0] + block[1] * grid[0] : block[0] * grid[1] + block[1];; i += grid[0] * grid[1]) {
        std::uint32_t start = 0;
        auto work = Scheduler::get_current_work_for_linear_idx(start, i, inside, p);
        if (!work.is_valid()) return count;
        do {
            const bool shared = Scheduler::requires_fixup(p, work);
            found[count++] = {work.M_idx, work.N_idx, work.K_idx, work.L_idx, int(work.k_tile_count),
                              shared ? int(Scheduler::output_tile_index(p, work)) : -1, Scheduler::compute_epilogue(work, p)};
        } while (Scheduler::continue_current_work_for_linear_idx(i, start, inside, work, p));
    }
}

// Bytes of workspace that CUTLASS asks for.
extern "C" long space(const Given& g) {
    typename Kernel::Arguments a{};
    a.problem_shape = {g.m, g.n, g.k, g.batches};
    a.hw_info.sm_count = g.processors;
    a.scheduler.max_swizzle_size = g.swizzle;
    BESIDE(a, g.beside);
    return Kernel::get_workspace_size(a);
}

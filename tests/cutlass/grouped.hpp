// CUTLASS's own arguments of a kernel of grouped.py.
#pragma once
struct Given {
    int groups, processors;
    const std::uint64_t* finish;  // operands of the epilogue, 8 bytes each
    std::uint64_t shapes, firsts, seconds, outs, first_pitches, second_pitches, out_pitches, workspace;
};

template <class T> void place(T& member, std::uint64_t address) { member = reinterpret_cast<T>(address); }

static typename Kernel::Arguments asked(const Given& g) {
    typename Kernel::Arguments a{};
    a.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    a.problem_shape.num_groups = g.groups;
    place(a.problem_shape.problem_shapes, g.shapes);
    a.hw_info.sm_count = g.processors;
    place(a.mainloop.ptr_A, g.firsts), place(a.mainloop.dA, g.first_pitches);
    place(a.mainloop.ptr_B, g.seconds), place(a.mainloop.dB, g.second_pitches);
    place(a.epilogue.ptr_D, g.outs), place(a.epilogue.dD, g.out_pitches);
    a.epilogue.dC = nullptr;
    set(a.epilogue.thread, g.finish);
    return a;
}
extern "C" int build(const Given& g, void* params, unsigned* grid) {
    const auto a = asked(g);
    if (!Kernel::can_implement(a)) return 0;
    const typename Kernel::Params p = Kernel::to_underlying_arguments(a, reinterpret_cast<void*>(g.workspace));
    std::memcpy(params, &p, sizeof p);
    const dim3 d = Kernel::get_grid_shape(p);
    grid[0] = d.x, grid[1] = d.y, grid[2] = d.z;
    return 1;
}
extern "C" int facts(int* threads, int* shared) {
    *threads = Kernel::MaxThreadsPerBlock, *shared = Kernel::SharedStorageSize;
    return sizeof(typename Kernel::Params);
}
extern "C" long space(const Given& g) { return Kernel::get_workspace_size(asked(g)); }
// Of a table's entries: what CUTLASS takes for a pitch and for the sizes of a product.
extern "C" void entries(int* sizes) {
    sizes[0] = sizeof(typename Kernel::InternalStrideA), sizes[1] = sizeof(typename Kernel::InternalStrideB);
    sizes[2] = sizeof(typename Kernel::InternalStrideD), sizes[3] = sizeof(typename Kernel::ProblemShape::UnderlyingProblemShape);
}

// CUTLASS's own arguments of a kernel of dense.py.
struct Given {
    int m, n, k, batches, processors, swizzle;  // of the first and second operand
    const std::uint64_t* finish;                // operands of the epilogue, 8 bytes each
    const std::uint64_t* beside;                // what another family has beside
    std::uint64_t first, second, out, added;
    std::int64_t first_pitch, second_pitch, out_pitch, added_pitch, first_batch, second_batch, out_batch, added_batch;
};

#ifndef BESIDE
#define BESIDE(arguments, numbers)
#endif
#ifndef WORKSPACE
#define WORKSPACE(numbers) nullptr
#endif

template <class Stride> Stride stride(std::int64_t pitch, std::int64_t batch) {
    Stride s{};
    if constexpr (cute::is_static_v<decltype(cute::get<1>(s))>) cute::get<0>(s) = pitch;
    else cute::get<1>(s) = pitch;
    cute::get<2>(s) = batch;
    return s;
}

extern "C" int build(const Given& g, void* params, unsigned* grid) {
    typename Kernel::Arguments a{};
    a.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    a.problem_shape = {g.m, g.n, g.k, g.batches};
    a.hw_info.sm_count = g.processors;
    a.scheduler.max_swizzle_size = g.swizzle;
    a.mainloop.ptr_A = reinterpret_cast<decltype(a.mainloop.ptr_A)>(g.first);
    a.mainloop.ptr_B = reinterpret_cast<decltype(a.mainloop.ptr_B)>(g.second);
    a.mainloop.dA = stride<typename Kernel::StrideA>(g.first_pitch, g.first_batch);
    a.mainloop.dB = stride<typename Kernel::StrideB>(g.second_pitch, g.second_batch);
    a.epilogue.ptr_C = reinterpret_cast<decltype(a.epilogue.ptr_C)>(g.added);
    a.epilogue.ptr_D = reinterpret_cast<decltype(a.epilogue.ptr_D)>(g.out);
    a.epilogue.dC = stride<typename Kernel::StrideC>(g.added_pitch, g.added_batch);
    a.epilogue.dD = stride<typename Kernel::StrideD>(g.out_pitch, g.out_batch);
    BESIDE(a, g.beside);
    if (!Kernel::can_implement(a)) return 0;
    set(a.epilogue.thread, g.finish);
    const typename Kernel::Params p = Kernel::to_underlying_arguments(a, WORKSPACE(g.beside));
    std::memcpy(params, &p, sizeof p);
    const dim3 d = Kernel::get_grid_shape(p);
    grid[0] = d.x, grid[1] = d.y, grid[2] = d.z;
    return 1;
}
extern "C" int facts(int* threads, int* shared) {
    *threads = Kernel::MaxThreadsPerBlock, *shared = Kernel::SharedStorageSize;
    return sizeof(typename Kernel::Params);
}

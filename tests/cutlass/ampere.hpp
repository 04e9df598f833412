// CUTLASS's own arguments of a kernel of ampere.py.
struct Given {
    int m, n, k, batches;
    const std::uint64_t* finish;  // operands of the epilogue, 8 bytes each
    std::uint64_t x, w;
    std::int64_t x_pitch, w_pitch, x_batch, w_batch;  // pitches in codes
};

extern "C" int build(const Given& g, void* params, unsigned* grid) {
    using Mode = cutlass::gemm::GemmUniversalMode;
    typename Kernel::FusionCallbacks::Arguments finish{};
    set(finish, g.finish);
    const auto mode = g.batches > 1 ? Mode::kBatched : Mode::kGemm;
    const typename Kernel::Arguments a(mode, {g.m, g.n, g.k}, g.batches, finish, reinterpret_cast<void*>(g.x),
                                       reinterpret_cast<void*>(g.w), nullptr, nullptr, g.x_batch, g.w_batch, 0, 0,
                                       g.x_pitch, g.w_pitch, g.n, g.n);
    if (Kernel::can_implement(a) != cutlass::Status::kSuccess) return 0;
    const typename Kernel::Params p(a, 108, 1);
    std::memcpy(params, &p, sizeof p);
    const dim3 d = p.get_grid_dims();
    grid[0] = d.x, grid[1] = d.y, grid[2] = d.z;
    return 1;
}
extern "C" int facts(int* threads, int* shared) {
    *threads = Kernel::kThreadCount, *shared = sizeof(typename Kernel::SharedStorage);
    return sizeof(typename Kernel::Params);
}

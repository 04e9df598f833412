// CUTLASS's own arguments of a kernel of blocks.py: beside those of dense.py, scales of both sides.
#pragma once
template <class Scales, class Layout>
void scales(Scales& pointer, Layout& layout, const std::uint64_t* numbers) {  // address, rows, columns, batches, pitch, batch
    pointer = reinterpret_cast<Scales>(numbers[0]);
    auto& rows = cute::get<1>(cute::get<0>(layout.shape()));
    auto& columns = cute::get<1>(cute::get<1>(layout.shape()));
    rows = numbers[1], columns = numbers[2], cute::get<2>(layout.shape()) = numbers[3];
    cute::get<1>(cute::get<0>(layout.stride())) = numbers[4], cute::get<2>(layout.stride()) = numbers[5];
}
#define BESIDE(a, numbers)                                                   \
    scales(a.mainloop.ptr_SFA, a.mainloop.layout_SFA, numbers);              \
    scales(a.mainloop.ptr_SFB, a.mainloop.layout_SFB, numbers + 6)
#include "dense.hpp"

// The producer's own code on the host: lanes one after the other, cp.async as an assignment.
template <> inline void cute::SM80_CP_ASYNC_CACHEALWAYS<float, float>::copy(const float& from, float& to) { to = from; }

// Scales of one tile and 128 columns, as they lie in shared memory.
extern "C" void brought(const typename Kernel::Params& params, int m, int n, int k, int batch, float* first, float* second) {
    alignas(128) static Mainloop::TensorStorage held;
    alignas(16) char nothing[sizeof(Mainloop::MainloopPipeline)]{};  // barriers do nothing on the host
    auto& pipeline = reinterpret_cast<Mainloop::MainloopPipeline&>(nothing);
    for (int i = 0; i < held.smem_SFA.size(); ++i) held.smem_SFA[i] = -1;
    for (int i = 0; i < held.smem_SFB.size(); ++i) held.smem_SFB[i] = -1;
    Mainloop mainloop;
    auto inputs = mainloop.load_init(params.problem_shape, params.mainloop);
    auto state = cutlass::make_producer_start_state<Mainloop::MainloopPipeline>();
    auto tiles = cute::shape<3>(cute::get<0>(inputs));
    for (int lane = 0; lane < 32; ++lane)
        mainloop.load_auxiliary(params.mainloop, pipeline, state, inputs, cute::make_coord(m, n, cute::_, batch),
                                cute::make_coord_iterator(cute::idx2crd(k, tiles), tiles), 1, lane, 0, held);
    for (int i = 0; i < Mainloop::ScaleMsPerTile; ++i) first[i] = held.smem_SFA[i];
    for (int i = 0; i < Mainloop::ScaleNsPerTile; ++i) second[i] = held.smem_SFB[i];
}

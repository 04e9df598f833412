// CUTLASS's own arguments of a kernel of mixed.py: beside those of dense.py, pitches in codes and scales of w.
#pragma once
template <class M> void scales(M& mainloop, const std::uint64_t* numbers) {  // group, scales, zeros, pitch, batch
    if constexpr (Mainloop::ModeHasScales) {
        mainloop.group_size = numbers[0];
        mainloop.ptr_S = reinterpret_cast<decltype(mainloop.ptr_S)>(numbers[1]);
        mainloop.ptr_Z = reinterpret_cast<decltype(mainloop.ptr_Z)>(numbers[2]);
        cute::get<1>(mainloop.dS) = numbers[3], cute::get<2>(mainloop.dS) = numbers[4];
    }
}
template <class S> auto shares(S& scheduler, const std::uint64_t* numbers, int) -> decltype(void(scheduler.locks)) {
    scheduler.locks = reinterpret_cast<int*>(numbers[0]);
}
template <class S> void shares(S&, const std::uint64_t*, long) {}
#define BESIDE(a, numbers)                                                        \
    a.mainloop.dA = stride<typename Kernel::StrideA>(numbers[0], numbers[1]);     \
    a.mainloop.dB = stride<typename Kernel::StrideB>(numbers[7], numbers[8]);     \
    scales(a.mainloop, numbers + 2), shares(a.scheduler, numbers + 9, 0)
#define WORKSPACE(numbers) reinterpret_cast<void*>(numbers[10])
#include "dense.hpp"

// Codes of memory, one after the other, as CUTLASS counts them.
extern "C" void numbers(const void* codes, int count, float* found) {
    auto tensor = cute::make_tensor(cute::recast_ptr<const typename Mainloop::ElementA>(codes), cute::make_layout(count));
    for (int i = 0; i < count; ++i) found[i] = static_cast<float>(static_cast<typename Mainloop::ElementA>(tensor(i)));
}

// CUTLASS's own arguments of a kernel of blackwell.py: beside those of dense.py, pitches in codes and scales.
#pragma once
template <class M> auto scales(M& a, const std::uint64_t* n, int m, int columns, int k, int batches)
    -> std::void_t<decltype(a.ptr_SFA)> {
    using Config = typename std::conditional_t<(sizeof(M) > 0), Mainloop, M>::Sm1xxBlkScaledConfig;
    const auto shape = cute::make_shape(m, columns, k, batches);
    a.ptr_SFA = reinterpret_cast<decltype(a.ptr_SFA)>(n[2]), a.ptr_SFB = reinterpret_cast<decltype(a.ptr_SFB)>(n[5]);
    a.layout_SFA = Config::tile_atom_to_shape_SFA(shape), a.layout_SFB = Config::tile_atom_to_shape_SFB(shape);
}
template <class... Others> void scales(const Others&...) {}
#define BESIDE(a, numbers)                                                        \
    a.mainloop.dA = stride<typename Kernel::StrideA>(numbers[0], numbers[1]);     \
    a.mainloop.dB = stride<typename Kernel::StrideB>(numbers[3], numbers[4]);     \
    scales(a.mainloop, numbers, g.m, g.n, g.k, g.batches)
#include "dense.hpp"

// Where the scale of a row and a block of columns is, in CUTLASS's layout.
template <class M> auto place_in(const M*, int rows, int k, int row, int column)
    -> decltype(typename M::Sm1xxBlkScaledConfig{}, int()) {
    return M::Sm1xxBlkScaledConfig::tile_atom_to_shape_SFA(cute::make_shape(rows, rows, k, 1))(row, column, 0);
}
inline int place_in(const void*, int, int, int, int) { return -1; }
extern "C" int place(int rows, int k, int row, int column) {
    return place_in(static_cast<const Mainloop*>(nullptr), rows, k, row, column);
}

// What kernels for Blackwell include: collectives that CUTLASS leaves out for NVRTC.
#pragma once
#include "cutlass_gemm.cuh"
#ifdef __CUDACC_RTC__
namespace cute {
// Of these NVRTC lacks the definitions. Params want no more than the types that they return.
template <class Number, class Copy, class Array, class Shared, class Values>
CUTE_HOST_DEVICE auto atom_of(const Copy& copy, const Array& array, const Shared& shared, const Values& values) {
    return detail::make_tma_copy_atom<Number>(copy, array, shared, uint32_t(1), values);
}
template <class Number, class Copy, class Array, class Shared, class Tile, class... Mma, class Cluster>
CUTE_HOST_DEVICE auto make_tma_atom_A_sm100(const Copy& copy, const Array& array, const Shared& shared,
                                            const Tile& tile, const TiledMMA<Mma...>& mma, const Cluster&) {
    const auto rows = make_identity_layout(shape(array)).compose(remove<1>(tile));
    return atom_of<Number>(copy, array, shared, layout<1>(mma.thrfrg_A(rows))(_, repeat<rank(rows)>(_)));
}
template <class Number, class Copy, class Array, class Shared, class Tile, class... Mma, class Cluster>
CUTE_HOST_DEVICE auto make_tma_atom_B_sm100(const Copy& copy, const Array& array, const Shared& shared,
                                            const Tile& tile, const TiledMMA<Mma...>& mma, const Cluster&) {
    const auto rows = make_identity_layout(shape(array)).compose(remove<0>(tile));
    return atom_of<Number>(copy, array, shared, layout<1>(mma.thrfrg_B(rows))(_, repeat<rank(rows)>(_)));
}
}  // namespace cute
#include "cutlass/gemm/collective/sm100_mma_warpspecialized.hpp"
#include "cutlass/gemm/collective/sm100_blockscaled_mma_warpspecialized.hpp"
#include "cutlass/gemm/collective/sm120_blockscaled_mma_tma.hpp"
#include "cutlass/gemm/collective/builders/sm100_umma_builder.inl"
#include "cutlass/gemm/collective/builders/sm100_blockscaled_umma_builder.inl"
#include "cutlass/gemm/collective/builders/sm120_blockscaled_mma_builder.inl"
#endif

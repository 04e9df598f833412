// What every kernel here includes: CUTLASS, and what NVRTC lacks of it.
#pragma once
#ifdef __CUDACC_RTC__
#include <cuda/std/type_traits>
namespace std {  // names of the standard library that CUTLASS uses and NVRTC does not have
using cuda::std::is_pointer_v;
template <class... T> using void_t = cuda::std::void_t<T...>;
}  // namespace std
#endif
#include "cutlass/cutlass.h"
#include "cute/tensor.hpp"
#ifdef __CUDACC_RTC__
namespace std {  // structured bindings of const tuples
template <class... T>
struct tuple_size<const cute::tuple<T...>> : cuda::std::integral_constant<size_t, sizeof...(T)> {};
template <size_t I, class... T> struct tuple_element<I, const cute::tuple<T...>> {
    using type = const typename cuda::std::tuple_element<I, cuda::std::tuple<T...>>::type;
};
}  // namespace std
#endif
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/gemm/kernel/tile_scheduler_params.h"
#include "cutlass/numeric_types.h"

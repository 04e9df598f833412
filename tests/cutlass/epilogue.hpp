// Members of the arguments of CUTLASS's visitors, by lowbit's names of them (epilogue.py).
#pragma once
template <class A> auto pointer(A& a, int) -> decltype((a.ptr_row)) { return a.ptr_row; }
template <class A> auto pointer(A& a, long) -> decltype((a.ptr_col)) { return a.ptr_col; }
template <class A> auto steps(A& a, int) -> decltype((a.dRow)) { return a.dRow; }
template <class A> auto steps(A& a, long) -> decltype((a.dCol)) { return a.dCol; }
template <class A> bool& step(A& a) {
    auto& s = steps(a, 0);
    if constexpr (cute::is_static_v<std::remove_cv_t<std::remove_reference_t<decltype(cute::get<0>(s))>>>) return cute::get<1>(s);
    else return cute::get<0>(s);
}
template <class T> void put(T& member, std::uint64_t bits) { std::memcpy(&member, &bits, sizeof member); }

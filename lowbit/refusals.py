"""What a QArray does not do by itself: everything that would need its values one by one."""

from __future__ import annotations

from typing import Any, NoReturn


def _needs_values(self: object, *others: object) -> NoReturn:
    raise TypeError("this would need the values of a QArray; call .dequantize() first")


class Refusals:
    """Methods that Python, NumPy, PyTorch and JAX look for, each answered by a way out."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]

    # Turning into an array of another library

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError(
            "a QArray does not turn into a NumPy array by itself; .dequantize() gives its "
            "values, .codes and .scales its parts"
        )

    def __dlpack__(self, **_: Any) -> Any:
        raise TypeError(
            "a QArray has no single memory to share; .dequantize() gives its values, .codes and "
            ".scales its parts"
        )

    __dlpack_device__ = __dlpack__

    # Being one number, or many

    def __float__(self) -> float:
        raise TypeError("a QArray is no number; .dequantize() gives its values")

    __int__ = __index__ = __complex__ = __float__

    def __bool__(self) -> bool:
        raise TypeError("the truth of a QArray is not defined; compare with lowbit.array_equal")

    def __iter__(self) -> Any:
        raise TypeError("a QArray is not iterated over; .dequantize() it, or index its rows")

    __reversed__ = __iter__

    def __contains__(self, item: object) -> bool:
        raise TypeError("`in` would need the values; search .dequantize()")

    # Comparing

    def __eq__(self, other: object) -> bool:
        raise TypeError("== would need the values; lowbit.array_equal compares two arrays whole")

    __lt__ = __le__ = __gt__ = __ge__ = _needs_values

    # Arithmetic that no scale can stand for

    __add__ = __radd__ = __sub__ = __rsub__ = _needs_values
    __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _needs_values
    __divmod__ = __rdivmod__ = __pow__ = __rpow__ = __abs__ = __round__ = _needs_values

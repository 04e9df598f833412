"""CuPy's rules on NumPy's memory: as many GPUs as a test wants, on a machine without any.

Arrays refuse to become NumPy arrays by themselves, to meet NumPy's, and to be worked on while
another device is current. tests/test_device_arrays.py compares the names here with those of CuPy.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_NAMES = """arange argwhere array array_equal asarray ascontiguousarray broadcast_to concatenate
copyto empty empty_like expand_dims full isfinite may_share_memory ones""".split()
_METHODS = """all any astype copy item max min ravel repeat reshape squeeze sum swapaxes tolist
transpose view""".split()
_PROPERTIES = "T dtype itemsize nbytes ndim shape size strides".split()
_VIEWS = {"reshape", "squeeze", "swapaxes", "transpose", "view"}
_OPERATORS = """
add sub mul truediv floordiv mod and or xor lshift rshift lt le gt ge eq ne radd rsub rmul
rtruediv neg invert abs iadd isub imul itruediv ior iand
""".split()


class CUDARuntimeError(RuntimeError):
    """What CuPy raises where CUDA reports an error."""


class _State:
    current = 0
    count = 2
    copied = 0  # arrays that went to the host
    stream = 0


state = _State()


class Device:
    """As `cupy.cuda.Device`."""

    def __init__(self, number: int) -> None:
        self.id = number
        self.before: list[int] = []

    def __enter__(self) -> Device:
        self.before.append(state.current)
        state.current = self.id
        return self

    def __exit__(self, *_: Any) -> None:
        state.current = self.before.pop()


class Stream:
    """As `cupy.cuda.Stream`: remembers which one is current."""

    def __init__(self, ptr: int = 1) -> None:
        self.ptr = ptr
        self.before: list[int] = []

    @staticmethod
    def from_external(other: Any) -> Stream:
        return Stream(other.__cuda_stream__()[1])

    def __enter__(self) -> Stream:
        self.before.append(state.stream)
        state.stream = self.ptr
        return self

    def __exit__(self, *_: Any) -> None:
        state.stream = self.before.pop()


class ndarray:
    """A NumPy array that says that it is on a GPU."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.held, self.number = np.empty(shape, dtype), state.current

    @property
    def device(self) -> Device:
        return Device(self.number)

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(device_id=self.number, ptr=self.held.ctypes.data)

    @property
    def flags(self) -> Any:
        flags = self.held.flags
        return types.SimpleNamespace(
            c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous
        )

    def get(self) -> np.ndarray[Any, Any]:
        state.copied += 1
        return self.held.copy()

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    __array_ufunc__ = None

    def __array_function__(self, func: Any, *_: Any) -> Any:
        raise TypeError(f"{func} is NumPy's")

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("memory of a GPU that only pretends to be one is not exchanged")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.number

    def __getitem__(self, index: Any) -> ndarray:
        indices = index if isinstance(index, tuple) else (index,)
        if any(isinstance(i, ndarray) for i in indices):
            picked: ndarray = _call(self.held.__getitem__, (index,), {}, self)
            return picked
        assert not any(isinstance(i, np.ndarray) for i in indices), "an index of NumPy"
        return _made(self.held[index], self.number)

    def __setitem__(self, index: Any, value: Any) -> None:
        _call(self.held.__setitem__, (index, value), {}, self)

    def __len__(self) -> int:
        return len(self.held)

    def __iter__(self) -> Iterator[ndarray]:
        return (_made(each, self.number) for each in self.held)

    def __bool__(self) -> bool:
        return bool(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def __float__(self) -> float:
        return float(self.held)

    def __matmul__(self, other: Any) -> Any:
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]


def _made(held: Any, number: int | None = None) -> ndarray:
    """Call memory of NumPy a GPU's, the current one's if not said otherwise."""
    array = object.__new__(ndarray)
    array.held, array.number = np.asarray(held), state.current if number is None else number
    return array


def _unwrapped(value: Any, used: set[int]) -> Any:
    if isinstance(value, ndarray):
        used.add(value.number)
        return value.held
    if isinstance(value, (list, tuple)):
        return type(value)(_unwrapped(each, used) for each in value)
    assert not (isinstance(value, np.ndarray) and value.ndim), "a NumPy array meets CuPy's"
    return value


def _call(function: Any, args: Any, kwargs: Any, *others: ndarray, view: bool = False) -> Any:
    used = {each.number for each in others}
    args = _unwrapped(args, used)
    result = function(*args, **{k: _unwrapped(v, used) for k, v in kwargs.items()})
    number = used.pop() if used else state.current
    assert not used, "arrays of two devices meet"
    assert view or number == state.current, "the arrays are not on the current device"
    if isinstance(result, (np.ndarray, np.generic)):
        return _made(result, number)
    return result


def _fill_class() -> None:
    for name in _METHODS:

        def method(self: Any, *args: Any, _name: str = name, **kwargs: Any) -> Any:
            view = _name in _VIEWS
            if _name == "astype" and kwargs.get("copy") is False and self.held.dtype == args[0]:
                return self
            return _call(getattr(self.held, _name), args, kwargs, self, view=view)

        setattr(ndarray, name, method)
    for name in _PROPERTIES:

        def get(self: Any, _name: str = name) -> Any:
            value = getattr(self.held, _name)
            return _made(value, self.number) if _name == "T" else value

        setattr(ndarray, name, property(get))
    for name in _OPERATORS:

        def operate(self: Any, *args: Any, _name: str = name) -> Any:
            return _call(getattr(self.held, f"__{_name}__"), args, {}, self)

        setattr(ndarray, f"__{name}__", operate)


_fill_class()


def _asarray(a: Any, dtype: Any = None) -> ndarray:
    if isinstance(a, ndarray) and a.number == state.current and dtype in (None, a.held.dtype):
        return a
    return _made(np.array(a.held if isinstance(a, ndarray) else a, dtype))


def _ascontiguousarray(a: ndarray, dtype: Any = None) -> ndarray:
    if a.flags.c_contiguous and dtype in (None, a.held.dtype):
        return a
    made: ndarray = _call(np.ascontiguousarray, (a, dtype), {})
    return made


def module(count: int = 2) -> Any:
    """A module to stand in `sys.modules` for cupy."""
    fake: Any = types.ModuleType("cupy")
    state.current, state.count, state.copied, state.stream = 0, count, 0, 0
    runtime = types.SimpleNamespace(
        getDevice=lambda: state.current,
        getDeviceCount=lambda: state.count,
        CUDARuntimeError=CUDARuntimeError,
    )
    fake.cuda = types.SimpleNamespace(
        runtime=runtime,
        Device=Device,
        Stream=Stream,
        get_current_stream=lambda: Stream(state.stream),
    )
    fake.ndarray = ndarray
    for name in _NAMES:
        function = getattr(np, name)
        view = name in ("broadcast_to", "expand_dims", "may_share_memory")
        setattr(fake, name, functools.partial(_named, name, function, view))
    fake.asarray, fake.ascontiguousarray = _asarray, _ascontiguousarray
    return fake


def _named(name: str, function: Any, view: bool, *args: Any, **kwargs: Any) -> Any:
    return _call(function, args, kwargs, view=view)


class Machine:
    """Launches on the arrays of this module by a machine that takes NumPy's."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.launches = inner, 0

    @property
    def device(self) -> Any:
        return self.inner.device

    def function(self, source: Any) -> Any:
        function = self.inner.function(source)

        def launch(grid: Any, block: Any, args: Any, *, shared_mem: int = 0) -> None:
            self.launches += 1
            held = tuple(a.held if isinstance(a, ndarray) else a for a in args)
            assert {a.number for a in args if isinstance(a, ndarray)} <= {state.current}
            function(grid, block, held, shared_mem=shared_mem)

        return launch

    def empty(self, shape: Any, dtype: Any) -> ndarray:
        return _made(self.inner.empty(shape, dtype))

    def zeros(self, shape: Any, dtype: Any) -> ndarray:
        return _made(self.inner.zeros(shape, dtype))

    def counters(self, count: int) -> ndarray:
        return _made(self.inner.counters(count))

    def scratch(self, count: int) -> ndarray:
        return _made(self.inner.scratch(count))

    def number(self, kind: Any, value: float) -> Any:
        return self.inner.number(kind, value)

    def matmul(self, x: Any, w: Any) -> ndarray:
        return _made(self.inner.matmul(x.held, w.held))

    def encode(self, wanted: Any) -> Any:
        return self.inner.encode(wanted)

    def by_value(self, data: bytes) -> Any:
        return self.inner.by_value(data)

    def settle(self) -> None:
        pass

    def address(self, array: Any) -> int:
        found: int = self.inner.address(array.held)
        return found


@contextmanager
def uncopied() -> Iterator[None]:
    """Nothing goes to the host meanwhile, so nothing waits for the device."""
    before = state.copied
    yield
    assert state.copied == before, "an array went to the host"

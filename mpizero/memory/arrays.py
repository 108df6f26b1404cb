"""Arrays of any library as flat numpy or CuPy memory, without a copy where there is a way.

``open_array`` is the one door through which users' arrays come in. What can be shared is shared;
what MPI and fast loops cannot take as it lies (with gaps between elements, or at addresses that are
no multiples of an element's size) is worked on in a copy that ``commit`` writes back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mpizero.errors import ArgumentError

# The raw CUDA stream on which an array's owner computes, on this thread, now; None: CuPy's own.
StreamOf = Callable[[], "int | None"]


@dataclass(frozen=True)
class _Bridge:
    """What an adapter has said of its framework's arrays."""

    owns: Callable[[object], bool]
    as_array: Callable[[Any], Any]
    stream: Callable[[int], int] | None


# How CuPy calls memory of its own; what comes from other libraries has other names.
_OF_CUPY = ("PooledMemory", "Memory", "MemoryAsync", "ManagedMemory")

_bridges: list[_Bridge] = []

_ALLOWED = (
    "a numpy or CuPy array, or an object with the buffer protocol, DLPack or "
    "__cuda_array_interface__"
)


def register_bridge(
    owns: Callable[[object], bool],
    as_array: Callable[[Any], Any],
    stream: Callable[[int], int] | None = None,
) -> None:
    """Let objects for which ``owns(x)`` holds come in as ``as_array(x)``, sharing their memory.

    ``stream(gpu)``: the raw CUDA stream on which this thread computes with such arrays on that GPU.
    A framework that does not say gets its results when they are there.
    """
    _bridges.append(_Bridge(owns, as_array, stream))


@dataclass(frozen=True)
class OpenArray:
    """A user's array (``original``), seen as ``array`` and worked on as the 1-D ``flat``.

    ``stream``: on which its owner uses it, if it is device memory; None: nobody knows.
    """

    original: Any
    array: Any
    flat: Any
    is_copy: bool
    stream: StreamOf | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self.flat.dtype
        return dtype

    def commit(self) -> Any:
        """Write the work back where ``flat`` is a copy; return the user's own object."""
        if self.is_copy:
            self.array[...] = self.flat.reshape(self.array.shape)
        return self.original


def open_array(x: Any, function: str, argument: str, *, writable: bool) -> OpenArray:
    """Open ``x`` for reading, or for reading and writing.

    Raises ArgumentError for objects that are no array, and for read-only memory when ``writable``.
    """
    array = _as_array(x, function, argument)
    if array.dtype.hasobject or array.dtype.itemsize == 0:
        raise ArgumentError(function, argument, f"an array of {array.dtype}", "plain numbers")
    if writable and isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ArgumentError(
            function,
            argument,
            f"a read-only array of {array.dtype}, shape {array.shape}",
            "a writable array",
            "Pass a copy, or give the result a place of its own with out=.",
        )
    if not isinstance(array, np.ndarray):
        stream = _stream_of(x, array)
        if array.flags.c_contiguous:
            return OpenArray(x, array, array.reshape(-1), False, stream)
        return OpenArray(x, array, array.ravel(), True, stream)
    if array.flags.c_contiguous and array.flags.aligned and array.dtype.names is None:
        return OpenArray(x, array, array.reshape(-1), False)
    dtype = _packed(array.dtype)
    if array.flags.c_contiguous and array.flags.aligned and array.dtype == dtype:
        return OpenArray(x, array, array.reshape(-1), False)
    return OpenArray(x, array, np.array(array, dtype, order="C").reshape(-1), True)


def empty_like(array: Any, shape: tuple[int, ...], dtype: Any = None) -> Any:
    """Uninitialised memory of the library and device of ``array``; of its dtype, or another."""
    dtype = array.dtype if dtype is None else dtype
    if isinstance(array, np.ndarray):
        return np.empty(shape, dtype)
    return type(array)(shape, dtype=dtype)  # cupy.ndarray(shape, dtype)


def overlap(first: Any, second: Any) -> bool:
    """True if two arrays may share memory: if the ranges in which their elements lie meet."""
    on_host = isinstance(first, np.ndarray), isinstance(second, np.ndarray)
    if all(on_host):
        return np.may_share_memory(first, second)
    if any(on_host) or not (first.size and second.size):
        return False
    (start, stop), (other_start, other_stop) = _range(first), _range(second)
    return start < other_stop and other_start < stop


def _range(array: Any) -> tuple[int, int]:
    """The addresses between which the elements of a device array lie (strides may be negative)."""
    start = stop = int(array.data.ptr)
    for extent, stride in zip(array.shape, array.strides, strict=True):
        reach = (extent - 1) * stride
        start, stop = start + min(0, reach), stop + max(0, reach)
    return start, stop + int(array.itemsize)


def same_place(first: Any, second: Any) -> bool:
    """True if two arrays start at one place in memory."""
    on_host = isinstance(first, np.ndarray), isinstance(second, np.ndarray)
    if all(on_host):
        return bool(first.ctypes.data == second.ctypes.data)
    return not any(on_host) and bool(first.data.ptr == second.data.ptr)


def on_device(array: Any) -> bool:
    """Is it device memory? (``array``: as ``open_array`` gives them.)"""
    return not isinstance(array, np.ndarray)


def to_host(array: Any) -> Any:
    """Numbers as numpy: a host array itself, or a copy of device memory, which is waited for."""
    return array if isinstance(array, np.ndarray) else array.get()


def assign(into: Any, values: Any) -> None:
    """``into[...] = values`` wherever either of them lies, on the calling thread's stream.

    CuPy takes no numpy array in an assignment, nor numpy a CuPy array.
    """
    if on_device(into) == on_device(values):
        into[...] = values
    elif on_device(values):
        into[...] = to_host(values)
    elif into.flags.c_contiguous:
        into.set(np.ascontiguousarray(values, into.dtype).reshape(into.shape))
    else:  # ``set`` wants memory without gaps
        arrived = empty_like(into, into.shape)
        assign(arrived, values)
        into[...] = arrived


def _as_array(x: Any, function: str, argument: str) -> Any:
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            raise ArgumentError(
                function, argument, "a masked array", "an array without a mask",
                "x.filled(value) has a number in place of each masked one.",
            )  # fmt: skip
        return np.asarray(x)  # a matrix, for instance, has no one-dimensional form
    for bridge in _bridges:
        if bridge.owns(x):
            return bridge.as_array(x)
    try:
        if hasattr(x, "__cuda_array_interface__"):
            return _as_cupy(x)
        if hasattr(x, "__dlpack__"):
            return _from_dlpack(x)
        if not isinstance(x, (str, bytes)):
            return np.asarray(memoryview(x))
    except (TypeError, BufferError, RuntimeError, ValueError) as error:
        raise ArgumentError(function, argument, _describe(x), _ALLOWED, f"({error})") from error
    raise ArgumentError(function, argument, _describe(x), _ALLOWED)


def _stream_of(x: Any, array: Any) -> StreamOf | None:
    """On which stream the device array's owner uses it; None: nobody knows.

    An array of CuPy's over memory of a framework's is used on that one's stream as well.
    """
    gpu = array.device.id
    if x is not array:
        for bridge in _bridges:
            if bridge.owns(x):
                return None if bridge.stream is None else partial(bridge.stream, gpu)
        return None
    if type(array.data.mem).__name__ not in _OF_CUPY:
        for bridge in _bridges:
            if bridge.stream is not None:
                return partial(bridge.stream, gpu)
    return lambda: None


def _as_cupy(x: Any) -> Any:
    from mpizero.world.device import as_device_array

    return as_device_array(x)


def _from_dlpack(x: Any) -> Any:
    kind, _ = x.__dlpack_device__()
    if kind == 2:  # kDLCUDA
        return _as_cupy(x)
    return np.from_dlpack(x)


def _packed(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """A structured dtype without what lies between its fields (``x[["a", "c"]]`` leaves out b).

    That is not the view's: it neither travels nor may be overwritten.
    """
    if dtype.subdtype is not None:
        return np.dtype((_packed(dtype.subdtype[0]), dtype.shape))
    if dtype.fields is None:
        return dtype
    fields = {name: field[0] for name, field in dtype.fields.items()}
    if sum(each.itemsize for each in fields.values()) > dtype.itemsize:
        return dtype  # they overlap: there are no gaps that a copy could leave out
    return np.dtype([(name, _packed(fields[name])) for name in dtype.names or ()])


def _describe(x: Any) -> str:
    return f"a {type(x).__module__}.{type(x).__qualname__}"

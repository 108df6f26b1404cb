"""``cupy.ndarray`` of the stand-in: kernels are queued on the calling thread's current stream.

Rules, and where they come from (cupy/_core/core.pyx and _routines_indexing.pyx of CuPy 14, unless
another is named):

* No implicit conversion: ``__array__`` raises TypeError; so do arithmetic and ufuncs with numpy
  arrays (_kernel.pyx, _preprocess_args). An assignment takes numbers and device arrays:
  ``ndarray.fill`` refuses a numpy array that is none of one number.
* ``get`` and ``set`` copy on the current stream, and wait (``set``'s copy from pageable memory may;
  CUDA Runtime API, "API synchronization behavior"). ``set`` wants a numpy array of the same dtype
  and shape, and a contiguous target.
* ``float``, ``int``, ``bool``, ``tolist``, ``item`` and an index of a numpy array wait for the
  current stream. Each is in ``FakeCupy.log``, as ("synchronize", stream).
* bfloat16 (_dtype.pyx): none before CuPy 14. Stricter than CuPy 14, whose kernels for it are new:
  memory of it is copied, viewed and zeroed here, nothing is computed.
* Kernels run on the current device, and want memory of it (no peer access is assumed).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from support.fake_cuda.memory import MemoryPointer, at_address
from support.fake_cuda.streams import CUDARuntimeError, Work

if TYPE_CHECKING:
    from support.fake_cuda import FakeCupy

_SCALARS = (bool, int, float, complex, np.generic)


class Array:
    """``cupy.ndarray``. ``host`` is its memory as it is now, to look at in tests."""

    _cupy: FakeCupy
    __array_priority__ = 100

    def __init__(
        self, shape: Any, dtype: Any = np.float64, memptr: Any = None, strides: Any = None
    ) -> None:
        dtype = self._cupy.check_dtype(dtype)
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if memptr is None:
            memptr = MemoryPointer(self._cupy.pool().malloc(nbytes), 0)
        flat = at_address(memptr.ptr, nbytes)
        self._take(flat.view(dtype).reshape(shape), memptr.device_id, memptr)

    def _take(self, host: np.ndarray[Any, Any], device: int, owner: Any) -> None:
        self.host, self._owner = host, owner
        self.device = SimpleNamespace(id=device)
        ptr = host.ctypes.data if host.size else getattr(owner, "ptr", 0)
        self.data = SimpleNamespace(ptr=ptr, mem=getattr(owner, "mem", owner), device_id=device)

    def _wrap(self, host: np.ndarray[Any, Any]) -> Any:
        array = object.__new__(type(self))
        array._take(host, self.device.id, self._owner)
        return array

    # Seen without a kernel: the form and views.
    shape = property(lambda self: self.host.shape)
    strides = property(lambda self: self.host.strides)
    dtype = property(lambda self: self.host.dtype)
    itemsize = property(lambda self: self.host.itemsize)
    size = property(lambda self: self.host.size)
    nbytes = property(lambda self: self.host.nbytes)
    ndim = property(lambda self: self.host.ndim)

    @property
    def flags(self) -> Any:
        flags = self.host.flags
        return SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous)

    @property
    def real(self) -> Any:
        return self._wrap(self.host.real)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return dict(self.host.__array_interface__, version=3, stream=None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.device.id)

    def __len__(self) -> int:
        return len(self.host)

    def __iter__(self) -> Any:
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[at] for at in range(self.shape[0]))

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __getitem__(self, key: Any) -> Any:
        if _is_advanced(key):
            key = self._index(key)
            result = type(self)(self.host[key].shape, dtype=self.dtype)
            place, host = result.host, self.host
            self._queue(lambda: np.copyto(place, host[key]))
            return result
        return self._wrap(self._place(key))

    def _place(self, key: Any) -> np.ndarray[Any, Any]:
        place = self.host[key]
        if isinstance(place, np.ndarray):
            return place
        at = key[0] if isinstance(key, tuple) and len(key) == 1 else key
        rows = self.host.reshape(-1) if self.ndim == 1 else self.host
        view: np.ndarray[Any, Any] = rows[_one(at, self.shape)].reshape(())
        return view

    def _index(self, key: Any) -> Any:
        """Indices on the host: CuPy copies them to the device, and a mask it counts, and waits."""
        self._cupy.current_stream.synchronize()
        if isinstance(key, tuple):
            return tuple(part.host if isinstance(part, Array) else part for part in key)
        return key.host if isinstance(key, Array) else key

    def reshape(self, *shape: Any) -> Any:
        found = self.host.reshape(*shape)
        if self.size and not np.may_share_memory(found, self.host):
            return self.copy().reshape(*shape)
        return self._wrap(found)

    def view(self, dtype: Any) -> Any:
        return self._wrap(self.host.view(self._cupy.check_dtype(dtype)))

    def squeeze(self) -> Any:
        return self._wrap(self.host.squeeze())

    # Done by kernels.

    def __setitem__(self, key: Any, value: Any) -> None:
        if _is_advanced(key):
            host, key = self.host, self._index(key)
            if isinstance(value, np.ndarray) and value.ndim:
                raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
            given = value.host if isinstance(value, Array) else value
            self._queue(lambda: host.__setitem__(key, given))
            return
        place = self._place(key)
        if not isinstance(value, Array):
            self._fill(place, value)
            return
        given = value.host
        same_form = place.shape == given.shape and place.strides == given.strides
        if same_form and place.size and place.ctypes.data == given.ctypes.data:
            return
        if not (same_form and place.dtype == given.dtype and place.flags.c_contiguous):
            self._cupy.check_computes(place.dtype, given.dtype)
        self._queue(lambda: np.copyto(place, given, casting="unsafe"))

    def fill(self, value: Any) -> None:
        if isinstance(value, Array):
            if value.shape:
                raise ValueError("non-scalar cupy.ndarray cannot be used for fill")
            self[...] = value
        else:
            self._fill(self.host, value)

    def _fill(self, place: np.ndarray[Any, Any], value: Any) -> None:
        one = np.asarray(value, dtype=place.dtype)
        if one.shape != ():
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        if one != 0 or not place.flags.c_contiguous:  # else CuPy sets bytes
            self._cupy.check_computes(place.dtype)
        self._queue(lambda: place.fill(one))

    def astype(self, dtype: Any, copy: bool = True) -> Any:
        dtype = self._cupy.check_dtype(dtype)
        if not copy and dtype == self.dtype:
            return self
        if dtype != self.dtype or not self.host.flags.c_contiguous:
            self._cupy.check_computes(dtype, self.dtype)
        result = type(self)(self.shape, dtype=dtype)
        place, host = result.host, self.host
        self._queue(lambda: np.copyto(place, host, casting="unsafe"))
        return result

    def copy(self) -> Any:
        return self.astype(self.dtype)

    def ravel(self) -> Any:
        return self.reshape(-1) if self.flags.c_contiguous else self.copy().reshape(-1)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        (out,) = options.pop("out", (None,))
        if method != "__call__":
            return NotImplemented
        hosts = [_operand(each) for each in (*inputs, *([] if out is None else [out]))]
        self._cupy.check_computes(*(h.dtype for h in hosts if isinstance(h, np.ndarray)))
        given = hosts[: len(inputs)]
        if out is None:
            blank = [np.ones(h.shape, h.dtype) if isinstance(h, np.ndarray) else h for h in given]
            with np.errstate(all="ignore"):
                form = np.asarray(ufunc(*blank, **options))
            out = type(self)(form.shape, dtype=form.dtype)
        place = out.host

        def kernel() -> None:
            with np.errstate(all="ignore"):  # the device has no warnings
                ufunc(*given, out=place, **options)

        self._queue(kernel)
        return out

    def _reduce(self, function: Any, **options: Any) -> Any:
        self._cupy.check_computes(self.dtype)
        host = self.host
        with np.errstate(all="ignore"):
            form = np.asarray(function(np.ones(self.shape, self.dtype), **options))
        result = type(self)(form.shape, dtype=form.dtype)
        place = result.host

        def kernel() -> None:
            with np.errstate(all="ignore"):
                place[...] = function(host, **options)

        self._queue(kernel)
        return result

    def sum(self, axis: Any = None, dtype: Any = None) -> Any:
        return self._reduce(np.sum, axis=axis, dtype=dtype)

    def any(self, axis: Any = None) -> Any:
        return self._reduce(np.any, axis=axis)

    def all(self, axis: Any = None) -> Any:
        return self._reduce(np.all, axis=axis)

    def max(self, axis: Any = None) -> Any:
        return self._reduce(np.max, axis=axis)

    # To and from the host, on the current stream.

    def get(
        self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True
    ) -> np.ndarray[Any, Any]:
        found = out
        if out is None:
            found = np.empty(self.shape, self.dtype)
        elif not isinstance(out, np.ndarray) or out.dtype != self.dtype:
            raise TypeError(f"{out.dtype} array cannot be obtained from {self.dtype} array")
        elif out.shape != self.shape:
            raise ValueError(f"Shape mismatch. Expected {self.shape}, actual {out.shape}")
        host, on = self.host, stream or self._cupy.current_stream
        on.add(lambda: np.copyto(found, host))
        if blocking:
            on.synchronize()
        return found

    def set(self, arr: Any, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if self.dtype != arr.dtype:
            raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
        if self.shape != arr.shape:
            raise ValueError(f"Shape mismatch. Old {self.shape}, new {arr.shape}")
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        on, place = stream or self._cupy.current_stream, self.host
        if arr.size and self._cupy.is_pinned(arr.ctypes.data, arr.nbytes):
            on.add(lambda: np.copyto(place, arr))  # asynchronous: reads it when its turn comes
            return
        on.synchronize()
        np.copyto(place, arr)

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    __float__ = lambda self: float(self.item())  # noqa: E731
    __int__ = lambda self: int(self.item())  # noqa: E731
    __bool__ = lambda self: bool(self.item())  # noqa: E731
    __index__ = lambda self: int(self.item())  # noqa: E731

    def _queue(self, kernel: Work) -> None:
        if self.device.id != self._cupy.current_device:
            raise CUDARuntimeError("the array's device is not the current device")
        self._cupy.launch(kernel)


def _operators() -> None:
    binary = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.true_divide,
        "rshift": np.right_shift, "lshift": np.left_shift, "and": np.bitwise_and,
        "or": np.bitwise_or, "xor": np.bitwise_xor,
    }  # fmt: skip
    compared = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
        "gt": np.greater, "ge": np.greater_equal,
    }  # fmt: skip
    for name, ufunc in (binary | compared).items():
        setattr(Array, f"__{name}__", lambda a, b, f=ufunc: a.__array_ufunc__(f, "__call__", a, b))
    for name, ufunc in binary.items():
        setattr(Array, f"__r{name}__", lambda a, b, f=ufunc: a.__array_ufunc__(f, "__call__", b, a))
        setattr(
            Array,
            f"__i{name}__",
            lambda a, b, f=ufunc: a.__array_ufunc__(f, "__call__", a, b, out=(a,)),
        )
    Array.__hash__ = object.__hash__  # type: ignore[method-assign]


_operators()


def _operand(value: Any) -> Any:
    if isinstance(value, Array):
        return value.host
    if isinstance(value, _SCALARS):
        return value
    raise TypeError(f"Unsupported type {type(value)}")  # cupy/_core/_kernel.pyx


def _is_advanced(key: Any) -> bool:
    parts = key if isinstance(key, tuple) else (key,)
    return any(isinstance(part, (Array, list, np.ndarray)) for part in parts)


def _one(at: Any, shape: tuple[int, ...]) -> Any:
    """The index of one element as slices, so that a view comes out."""
    parts = at if isinstance(at, tuple) else (at,)
    whole = [int(p) % n if n else 0 for p, n in zip(parts, shape, strict=True)]
    return tuple(slice(p, p + 1) for p in whole)

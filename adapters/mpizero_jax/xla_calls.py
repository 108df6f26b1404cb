"""XLA's calls into Python: work of ours in the midst of a compiled program, on XLA's own memory.

A handler of XLA's foreign function interface (``xla/ffi/api/c_api.h``, which jaxlib carries along)
is a C function that gets a *call frame*: the operands' and the results' memory. This one is made
by ctypes, so nothing is compiled, and hands both on as numpy arrays without a copy; jax's own
callbacks make jax arrays of the operands, in the very threads that the program needs.

What is to be done is found by a number in the frame: a ``Work``, noted when the program was traced.
"""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from mpizero import MpizeroError

TARGET = "mpizero_call"

# (the operands, to be read; the results, to be written)
Work = Callable[[Sequence[Any], Sequence[Any]], None]

_DTYPES: dict[int, Any] = {  # XLA_FFI_DataType
    1: np.bool_,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.uint8,
    7: np.uint16,
    8: np.uint32,
    9: np.uint64,
    10: np.float16,
    11: np.float32,
    12: np.float64,
    15: np.complex64,
    16: ml_dtypes.bfloat16,
    18: np.complex128,
    19: ml_dtypes.float8_e5m2,
    20: ml_dtypes.float8_e4m3fn,
}
_TOKEN = 17
_METADATA = 1  # XLA_FFI_Extension_Metadata: XLA asks for which version the handler was made
_EXECUTE = 3  # XLA_FFI_ExecutionStage_EXECUTE
_INTERNAL = 13  # XLA_FFI_Error_Code_INTERNAL


def can_travel(dtype: Any) -> bool:
    """Can arrays of it come here?"""
    return any(dtype == each for each in _DTYPES.values())  # numpy has no name for some


class _Head(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("extension", ctypes.c_void_p))


class _Extension(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", ctypes.c_void_p))


class _Version(ctypes.Structure):
    _fields_ = (("head", _Head), ("major", ctypes.c_int), ("minor", ctypes.c_int))


class _Metadata(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("version", _Version), ("traits", ctypes.c_uint32))


class _MetadataExtension(ctypes.Structure):
    _fields_ = (("base", _Extension), ("metadata", ctypes.POINTER(_Metadata)))


class _Api(ctypes.Structure):  # its beginning
    _fields_ = (
        ("head", _Head),
        ("version", _Version),
        ("internal", ctypes.c_void_p),
        ("error_create", ctypes.c_void_p),
    )


class _ErrorArguments(ctypes.Structure):
    _fields_ = (("head", _Head), ("message", ctypes.c_char_p), ("code", ctypes.c_int))


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("head", _Head),
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )


class _Buffers(ctypes.Structure):
    _fields_ = (
        ("head", _Head),
        ("count", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )


class _Scalar(ctypes.Structure):
    _fields_ = (("dtype", ctypes.c_int), ("value", ctypes.POINTER(ctypes.c_int64)))


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("head", _Head),
        ("count", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("names", ctypes.c_void_p),
        ("values", ctypes.POINTER(ctypes.POINTER(_Scalar))),
    )


class _Frame(ctypes.Structure):
    _fields_ = (
        ("head", _Head),
        ("api", ctypes.POINTER(_Api)),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("operands", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    )


_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Frame))

# Compiled programs refer to works by number for as long as they live, which nobody is told: equal
# works, which have equal keys, are noted once.
_works: dict[int, Work] = {}
_numbers: dict[Hashable, int] = {}
_count = itertools.count()

_last_error: BaseException | None = None


def note(key: Hashable, make: Callable[[], Work]) -> int:
    """The number of a work, which is made if none of this key has been noted."""
    number = _numbers.get(key)
    if number is None:
        work = make()
        number = _numbers[key] = next(_count)
        _works[number] = work
    return number


def take_error() -> BaseException | None:
    """The error of a work that has failed since this was last asked."""
    global _last_error
    found, _last_error = _last_error, None
    return found


def _view(buffer: _Buffer, *, writable: bool) -> Any:
    dtype = np.dtype(_DTYPES[buffer.dtype])
    shape = tuple(buffer.dims[: buffer.rank]) if buffer.rank else ()
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.empty(shape, dtype)
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(buffer.data)
    array = np.frombuffer(memory, dtype).reshape(shape)
    array.flags.writeable = writable
    return array


def _views(buffers: _Buffers, *, writable: bool) -> list[Any]:
    found = (buffers.buffers[at].contents for at in range(buffers.count))
    return [_view(each, writable=writable) for each in found if each.dtype != _TOKEN]


def _handle(frame_pointer: Any) -> int | None:
    """Called by XLA, in any of its threads. An exception must not leave it."""
    frame = frame_pointer.contents
    try:
        if frame.head.extension and _answer_metadata(frame):
            return None
        if frame.stage == _EXECUTE:
            number = frame.attributes.values[0].contents.value[0]
            work = _works[number]
            work(_views(frame.operands, writable=False), _views(frame.results, writable=True))
    except BaseException as error:  # told to XLA, which raises it where results are waited for
        return _told(frame, error)
    return None


def _answer_metadata(frame: Any) -> bool:
    extension = _Extension.from_address(frame.head.extension)
    if extension.type != _METADATA:
        return False
    metadata = _MetadataExtension.from_address(frame.head.extension).metadata.contents
    metadata.version.major, metadata.version.minor = _version()
    metadata.traits = 0
    return True


def _told(frame: Any, error: BaseException) -> int | None:
    global _last_error
    _last_error = error
    text = str(error) if isinstance(error, MpizeroError) else f"{type(error).__name__}: {error}"
    arguments = _ErrorArguments()
    arguments.head.size = ctypes.sizeof(_ErrorArguments)
    arguments.message = text.encode()
    arguments.code = _INTERNAL
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_ErrorArguments))(
        frame.api.contents.error_create
    )
    found: int | None = create(ctypes.byref(arguments))
    return found


@lru_cache(maxsize=1)
def _version() -> tuple[int, int]:
    """The version of the interface, as the header says that came with this jaxlib."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = (
        int(re.findall(rf"#define XLA_FFI_API_{name} (\d+)", header)[0])
        for name in ("MAJOR", "MINOR")
    )
    return major, minor


_handler = _HANDLER(_handle)  # XLA calls it for as long as the process lives
jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(_handler), platform="cpu")

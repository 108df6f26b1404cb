"""``cupy.cuda.nccl`` of the stand-in, between processes by way of files.

Rules, and where they come from:

* Calls are enqueued on a stream and return; between ``groupStart`` and ``groupEnd`` they are one
  (NCCL user guide, "Group Calls"). Sums go from rank to rank, rounded to the dtype at every hop; a
  NaN is lost in max and min, as C's fmax loses it (NCCL, src/device/reduce_kernel.h).
* Two ranks of one host on one GPU are refused (NCCL, src/init.cc: "Duplicate GPU detected");
  ``NCCL_HOSTID`` says which host (NCCL user guide, "Environment Variables").
* The unique id is bytes, since CuPy 14; before a tuple (cupy_backends/cuda/libs/nccl.pyx).
* A communicator that is destroyed, or given back by the garbage collector, is of no more use.
"""

from __future__ import annotations

import os
import pickle
import secrets
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from support.fake_cuda.memory import at_address
from support.fake_cuda.streams import until

if TYPE_CHECKING:
    from support.fake_cuda import FakeCupy

_DTYPES = {
    "INT8": np.int8, "UINT8": np.uint8, "INT32": np.int32, "UINT32": np.uint32, "INT64": np.int64,
    "UINT64": np.uint64, "FLOAT16": np.float16, "FLOAT32": np.float32, "FLOAT64": np.float64,
    "BFLOAT16": ml_dtypes.bfloat16,
}  # fmt: skip
_NUMBERED = [np.dtype(each) for each in _DTYPES.values()]
_OPERATIONS = [np.add, np.multiply, np.fmax, np.fmin]
_ID_BYTES = 128

# Who has come to the end of a group has seen all ranks begin it; they may be reading the first of
# its calls yet, of which there are no more than ranks.
_KEPT = 8


class NcclError(RuntimeError):
    """As CuPy's."""


class Nccl:
    """The module."""

    available = True
    NcclError = NcclError

    def __init__(self, cupy: FakeCupy) -> None:
        self._cupy = cupy
        self._group: list[tuple[Any, Callable[[], Callable[[], None]]]] | None = None
        self.calls: list[str] = []  # what was asked for
        self.broken = ""  # what check_async_error is to say
        for number, name in enumerate(_DTYPES):
            setattr(self, f"NCCL_{name}", number)
        for number, name in enumerate(("SUM", "PROD", "MAX", "MIN")):
            setattr(self, f"NCCL_{name}", number)

    def get_unique_id(self) -> Any:
        number = secrets.token_bytes(8).ljust(_ID_BYTES, b"\0")
        return number if int(self._cupy.__version__.split(".")[0]) >= 14 else tuple(number)

    def NcclCommunicator(self, size: int, number: Any, rank: int) -> Communicator:  # noqa: N802
        new = int(self._cupy.__version__.split(".")[0]) >= 14
        if not isinstance(number, bytes if new else tuple) or len(number) != _ID_BYTES:
            raise TypeError("Expected bytes" if new else "Expected tuple")
        return Communicator(self, self._cupy, size, bytes(number[:8]).hex(), rank)

    def groupStart(self) -> None:  # noqa: N802
        self._group = []

    def groupEnd(self) -> None:  # noqa: N802
        group, self._group = self._group or [], None
        if not group:
            return

        def together() -> None:
            receiving = [work() for _, work in group]  # all that leaves does, before any waits
            for receive in receiving:
                receive()

        group[0][0].add(together, crossing=True)

    def enqueue(self, stream_ptr: int, work: Callable[[], Callable[[], None]]) -> None:
        """``work()`` sends, and returns what receives."""
        stream = self._cupy.stream_at(stream_ptr)
        if self._group is None:
            stream.add(lambda: work()(), crossing=True)
        else:
            self._group.append((stream, work))


class Communicator:
    """``NcclCommunicator``."""

    def __init__(self, nccl: Nccl, cupy: FakeCupy, size: int, name: str, rank: int) -> None:
        self._nccl, self._cupy, self._size, self._rank = nccl, cupy, size, rank
        self._folder: Path | None = Path(f"/dev/shm/fake_cuda.nccl.{name}")
        self._folder.mkdir(exist_ok=True)
        self._count = 0
        self._sent: defaultdict[int, int] = defaultdict(int)
        self._got: defaultdict[int, int] = defaultdict(int)
        mine = os.environ.get("NCCL_HOSTID", "this host"), cupy.current_device
        self._show(f"init.{rank}", pickle.dumps(mine))
        told = [pickle.loads(self._see(f"init.{each}")) for each in range(size)]
        if len({*told}) < size:
            raise NcclError("NCCL_ERROR_INVALID_USAGE: Duplicate GPU detected")

    def destroy(self) -> None:
        if self._folder is not None and self._rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    abort = destroy

    def check_async_error(self) -> None:
        if self._nccl.broken:
            raise NcclError(self._nccl.broken)

    def allReduce(self, source: int, target: int, count: int, kind: int, op: int, on: int) -> None:  # noqa: N802
        self._together("allReduce", source, count, kind, on, self._sum_into(target, op))

    def reduce(
        self, source: int, target: int, count: int, kind: int, op: int, root: int, on: int
    ) -> None:
        put = self._sum_into(target, op) if root == self._rank else lambda rows: None
        self._together("reduce", source, count, kind, on, put)

    def reduceScatter(  # noqa: N802
        self, source: int, target: int, count: int, kind: int, op: int, on: int
    ) -> None:
        own = slice(self._rank * count, (self._rank + 1) * count)
        put = self._sum_into(target, op)
        self._together(
            "reduceScatter", source, count * self._size, kind, on,
            lambda rows: put([row[own] for row in rows]),
        )  # fmt: skip

    def allGather(self, source: int, target: int, count: int, kind: int, on: int) -> None:  # noqa: N802
        def put(rows: list[Any]) -> None:
            whole = np.concatenate(rows).view(np.uint8)
            at_address(target, whole.size)[...] = whole

        self._together("allGather", source, count, kind, on, put)

    def broadcast(
        self, source: int, target: int, count: int, kind: int, root: int, on: int
    ) -> None:
        def put(rows: list[Any]) -> None:
            at_address(target, rows[root].nbytes)[...] = rows[root].view(np.uint8)

        self._together("broadcast", source, count, kind, on, put)

    def send(self, source: int, count: int, kind: int, peer: int, on: int) -> None:
        self._nccl.calls.append("send")
        nbytes = count * _NUMBERED[kind].itemsize
        name = f"{self._rank}.{peer}.{self._sent[peer]}"
        self._sent[peer] += 1

        def work() -> Callable[[], None]:
            self._show(name, at_address(source, nbytes).tobytes())
            return lambda: None

        self._nccl.enqueue(on, work)

    def recv(self, target: int, count: int, kind: int, peer: int, on: int) -> None:
        nbytes = count * _NUMBERED[kind].itemsize
        name = f"{peer}.{self._rank}.{self._got[peer]}"
        self._got[peer] += 1

        def receive() -> None:
            came = np.frombuffer(self._see(name, forget=True), np.uint8)
            at_address(target, nbytes)[...] = came

        self._nccl.enqueue(on, lambda: receive)

    def _sum_into(self, target: int, op: int) -> Callable[[list[Any]], None]:
        def put(rows: list[Any]) -> None:
            total = rows[0].copy()
            with np.errstate(all="ignore"):
                for row in rows[1:]:
                    total = _OPERATIONS[op](total, row).astype(total.dtype)
            at_address(target, total.nbytes)[...] = total.view(np.uint8)

        return put

    def _together(
        self, what: str, source: int, count: int, kind: int, on: int, put: Callable[[Any], None]
    ) -> None:
        if self._folder is None:
            raise NcclError("NCCL_ERROR_INVALID_ARGUMENT: the communicator has been destroyed")
        self._nccl.calls.append(what)
        dtype, number = _NUMBERED[kind], self._count
        self._count += 1

        def work() -> Callable[[], None]:
            nbytes = count * dtype.itemsize
            told = pickle.dumps((what, count, kind, at_address(source, nbytes).tobytes()))
            self._show(f"all.{number}.{self._rank}", told)

            def receive() -> None:
                found = [pickle.loads(self._see(f"all.{number}.{r}")) for r in range(self._size)]
                if len({each[:3] for each in found}) > 1:
                    raise NcclError(f"NCCL_ERROR_INVALID_USAGE: {[each[:3] for each in found]}")
                put([np.frombuffer(each[3], dtype) for each in found])
                if number >= _KEPT and self._folder is not None:
                    (self._folder / f"all.{number - _KEPT}.{self._rank}").unlink(missing_ok=True)

            return receive

        self._nccl.enqueue(on, work)

    def _show(self, name: str, data: bytes) -> None:
        assert self._folder is not None
        beside = self._folder / f"{name}.part"
        beside.write_bytes(data)
        beside.rename(self._folder / name)

    def _see(self, name: str, forget: bool = False) -> bytes:
        assert self._folder is not None
        path = self._folder / name
        until(path.exists, f"NCCL waits for {name}")
        data = path.read_bytes()
        if forget:
            path.unlink()
        return data

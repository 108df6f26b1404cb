"""GPU memory: which device, in which order, through which way. On a stand-in for CuPy.

The stand-in does queued work only when somebody waits for it, so a missing wait gives wrong
numbers here, always.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpizero.errors import ArgumentError
from mpizero.memory import arrays
from mpizero.memory import cuda_aware as awareness
from mpizero.memory.arrays import assign, open_array, overlap, same_place
from mpizero.memory.cuda_aware import CudaAwareness, cuda_aware, probe_in_child
from mpizero.memory.order import Order, on_host, on_stream, opened
from mpizero.memory.staging import staged
from mpizero.world import device as device_module
from mpizero.world.device import CudaDevice, Device, HostDevice, as_device_array, bind_device
from support.fake_cuda import FakeCupy

pytestmark = pytest.mark.once

RANKS = 3
CHUNK = 96  # bytes: 24 float32 in one row, 8 in each of three


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MPIZERO_DEVICE", "MPIZERO_CUDA_AWARE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cupy() -> FakeCupy:
    return FakeCupy()


@pytest.fixture
def device(cupy: FakeCupy) -> CudaDevice:
    return CudaDevice(0, cupy)


def numbers(rows: int, columns: int) -> Any:
    return np.arange(rows * columns, dtype=np.float32).reshape(rows, columns) + 1


def filled_by_kernel(cupy: FakeCupy, values: Any) -> Any:
    """A device array whose numbers are still to come, on a stream of the user's."""
    cupy.use_stream("user")
    array = cupy.empty(values.shape, values.dtype)
    compute(cupy, array, values)
    return array


def compute(cupy: FakeCupy, array: Any, values: Any) -> None:
    """A kernel, queued and not yet run, that puts ``values`` into a device array."""
    place = array.host
    cupy.launch(lambda: np.copyto(place, values))


def stage(device: CudaDevice, event: Any, *arguments: Any, **options: Any) -> None:
    """``staged``, on a stream that follows ``event``."""
    with device.communicating():
        device.follow(event)
        staged(device, *arguments, **options)


def order_of(device: Device, *arrays: Any) -> Order:
    return Order(device, on_stream(lambda: None, *arrays))


# -- which device --------------------------------------------------------------------------------


@pytest.mark.parametrize(("local_rank", "index"), [(0, 0), (1, 1), (2, 2), (3, 0), (7, 1)])
def test_gpu_is_local_rank_modulo_visible_gpus(local_rank: int, index: int) -> None:
    cupy = FakeCupy(gpus=3)
    device = bind_device(local_rank, lambda: cupy)
    assert (device.kind, device.index, device.name) == ("cuda", index, f"cuda:{index}")
    assert cupy.current_device == index


@pytest.mark.parametrize("cupy", [None, FakeCupy(gpus=0)], ids=["no CuPy", "no GPU"])
def test_host_without_a_gpu(cupy: FakeCupy | None) -> None:
    device = bind_device(1, lambda: cupy)
    assert (device.kind, device.index, device.name) == ("cpu", None, "cpu")


@pytest.mark.parametrize(
    ("wish", "name"), [("cpu", "cpu"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0")]
)
def test_override(monkeypatch: pytest.MonkeyPatch, wish: str, name: str) -> None:
    monkeypatch.setenv("MPIZERO_DEVICE", wish)
    assert bind_device(3, lambda: FakeCupy(gpus=2)).name == name


def test_cpu_override_does_not_import_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPIZERO_DEVICE", "cpu")
    bind_device(0, lambda: pytest.fail("imported"))


@pytest.mark.parametrize("wish", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "CUDA", "cuda:2"])
def test_impossible_override(monkeypatch: pytest.MonkeyPatch, wish: str) -> None:
    monkeypatch.setenv("MPIZERO_DEVICE", wish)
    with pytest.raises(ArgumentError, match=f"MPIZERO_DEVICE.*{wish}.*allowed: cpu, cuda"):
        bind_device(0, lambda: FakeCupy(gpus=2))


@pytest.mark.parametrize(("cupy", "why"), [(None, "CuPy"), (FakeCupy(gpus=0), "No GPU is visible")])
def test_demanded_gpu_is_missing(
    monkeypatch: pytest.MonkeyPatch, cupy: FakeCupy | None, why: str
) -> None:
    monkeypatch.setenv("MPIZERO_DEVICE", "cuda")
    with pytest.raises(ArgumentError, match=why):
        bind_device(0, lambda: cupy)


def test_absent_cupy_is_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail("imported"))
    assert isinstance(bind_device(0), HostDevice)
    with pytest.raises(RuntimeError, match=r"mpizero\[cuda\]"):
        as_device_array(object())


def test_broken_cupy_gives_the_host_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('libcudart.so is missing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    with pytest.warns(UserWarning, match="libcudart"):
        assert isinstance(bind_device(0), HostDevice)


def test_host_device_waits_for_nothing() -> None:
    device: Device = HostDevice()
    order = order_of(device, np.zeros(3))
    with order.section(device.new_stream()), device.using(None):
        assert not device.is_device_array(device.empty(3, np.float64))
    order.wait()
    assert order.is_done()
    device.activate()
    device.check(np.zeros(3), "f()", "x")
    with pytest.raises(ArgumentError, match="bound to the host"):
        device.check(FakeCupy().empty(3), "f()", "x")


def test_array_of_another_gpu_is_refused() -> None:
    cupy = FakeCupy(gpus=2)
    device = CudaDevice(1, cupy)
    device.check(cupy.empty(3), "f()", "x")
    with cupy.cuda.Device(0):
        elsewhere = cupy.empty(3)
    with pytest.raises(ArgumentError, match="GPU 0; allowed: an array on GPU 1"):
        device.check(elsewhere, "f()", "x")


def test_foreign_device_memory_comes_by_dlpack(
    monkeypatch: pytest.MonkeyPatch, cupy: FakeCupy
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    own = cupy.empty(3)
    assert as_device_array(own) is own
    assert isinstance(as_device_array(np.ones(2)), cupy.ndarray)  # has __dlpack__, as torch does
    assert cupy.log[0] == ("from_dlpack",)


# -- order ---------------------------------------------------------------------------------------


def test_the_stand_in_shows_a_missing_wait(cupy: FakeCupy, device: CudaDevice) -> None:
    array = filled_by_kernel(cupy, numbers(1, 50))
    stage(device, None, array, array, double, CHUNK)
    assert not np.array_equal(array.host, 2 * numbers(1, 50))


@pytest.mark.parametrize("columns", [5, 50, 500])
def test_event_is_waited_for_and_result_is_there(
    cupy: FakeCupy, device: CudaDevice, columns: int
) -> None:
    array = filled_by_kernel(cupy, numbers(1, columns))
    event = device.record()
    array[...] = np.float32(0)  # queued after the submission: must not be waited for
    stage(device, event, array, array, double, CHUNK)
    # Looked at without any synchronisation: the last copy has finished.
    assert np.array_equal(array.host, 2 * numbers(1, columns))


def test_event_on_the_raw_stream_of_another_library(cupy: FakeCupy, device: CudaDevice) -> None:
    array = filled_by_kernel(cupy, numbers(1, 50))
    pointer = cupy.current_stream.ptr
    cupy.use_stream("another")
    stage(device, device.record(pointer), array, array, double, CHUNK)
    assert np.array_equal(array.host, 2 * numbers(1, 50))


def test_kernels_of_a_section_come_before_staging(cupy: FakeCupy, device: CudaDevice) -> None:
    source = filled_by_kernel(cupy, numbers(1, 50))
    target = cupy.empty((1, 50), np.float32)
    order = order_of(device, source, target)
    with order.section():
        target[...] = source
        staged(device, target, target, double, CHUNK)
        np.divide(target, 4, out=target)
    order.wait()
    assert np.array_equal(target.get(), numbers(1, 50) / 2)


def test_kernels_of_a_section_do_not_overwrite_what_arrives(
    cupy: FakeCupy, device: CudaDevice
) -> None:
    target = cupy.empty((1, 500), np.float32)

    def receive(host_in: Any, host_out: Any) -> None:
        host_out[...] = 5

    with order_of(device, target).section():
        target[...] = np.float32(0)
        staged(device, None, target, receive, CHUNK)
    assert (target.host == 5).all()


def test_mpi_is_given_what_is_there(cupy: FakeCupy, device: CudaDevice) -> None:
    array = filled_by_kernel(cupy, numbers(1, 4))
    with order_of(device, array).section():
        array += 1
        device.settle(array)
        assert np.array_equal(array.host, numbers(1, 4) + 1)  # what MPI would read
    assert cupy.current_stream.name == "user"


@pytest.mark.parametrize("order", ["late", "early"])
def test_a_section_has_its_place_among_the_streams(order: str) -> None:
    cupy = FakeCupy(order=order)
    device = CudaDevice(0, cupy)
    array = filled_by_kernel(cupy, numbers(1, 40))
    doubled = order_of(device, array)
    compute(cupy, array, numbers(1, 40) * 0 + 7)  # queued after the submission
    waited = cupy.host_waits()
    with doubled.section(device.new_stream()):
        np.multiply(array, 2, out=array)
    doubled.wait()
    array += 1
    assert cupy.host_waits() == waited
    assert not doubled.is_done() or order == "early"
    found = array.get()
    # (Whoever changes what has been submitted, and does not wait, gets one or the other.)
    assert all(np.isin(found[0, at], (2 * at + 3, 8.0, 15.0)) for at in range(40))


@pytest.mark.parametrize("order", ["late", "early"])
def test_what_a_section_reads_is_not_given_out_again(order: str) -> None:
    cupy = FakeCupy(order=order)
    device = CudaDevice(0, cupy)
    source = filled_by_kernel(cupy, numbers(1, 40))
    target = cupy.empty((1, 40), np.float32)
    copied = order_of(device, target, source)
    with copied.section(device.new_stream()):
        np.add(source, 1, out=target)
    address = source.data.ptr
    del source
    again = cupy.empty((1, 40), np.float32)
    again.fill(-1)
    assert again.data.ptr != address
    copied.wait()
    assert np.array_equal(target.get(), numbers(1, 40) + 1)
    del copied
    with order_of(device, again).section():
        pass
    device.synchronize()
    with order_of(device, again).section():  # what is done lets go
        pass
    assert cupy.empty((1, 40), np.float32).data.ptr == address


def test_memory_with_gaps_is_kept_until_it_is_written_back(
    monkeypatch: pytest.MonkeyPatch, cupy: FakeCupy, device: CudaDevice
) -> None:
    """Its user lets go of it, and nobody waits: who gets the memory next must find it quiet."""
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    whole = filled_by_kernel(cupy, numbers(4, 10))
    array = open_array(whole[:, ::2], "f()", "x", writable=True)
    order = Order(device, opened(array))
    with order.section(device.new_stream()):
        np.multiply(array.flat, 2, out=array.flat)
        array.commit()
    del whole, array, order
    again = cupy.empty((4, 10), np.float32)
    again.fill(-1)
    assert (again.get() == -1).all()
    cupy.cuda.Device(0).synchronize()
    assert (again.get() == -1).all()


@pytest.mark.parametrize("order", ["late", "early"])
def test_room_for_a_result_is_the_callers(order: str) -> None:
    """Freed, it is given out in the order of the caller's stream: not before its last kernel."""
    cupy = FakeCupy(order=order)
    device = CudaDevice(0, cupy)
    source = filled_by_kernel(cupy, numbers(1, 40))
    lane, found = device.new_stream(), []
    for factor in (2, 3):
        made = order_of(device, source)
        with made.section(lane):
            result = made.room(lambda: cupy.empty((1, 40), np.float32))
            np.multiply(source, factor, out=result)
        made.wait()
        result += 1
        found.append(result.copy())
        del result
    assert np.array_equal(found[0].get(), 2 * numbers(1, 40) + 1)
    assert np.array_equal(found[1].get(), 3 * numbers(1, 40) + 1)


def test_an_error_leaves_the_order_as_it_was(cupy: FakeCupy, device: CudaDevice) -> None:
    array = filled_by_kernel(cupy, numbers(1, 4))
    order = order_of(device, array)

    def communicate() -> None:
        with order.section():
            array.fill(9)
            raise ValueError("from MPI")

    with pytest.raises(ValueError, match="from MPI"):
        communicate()
    order.wait()
    assert (array.get() == 9).all()


def test_a_section_does_not_wait_for_later_compute(cupy: FakeCupy, device: CudaDevice) -> None:
    array = filled_by_kernel(cupy, numbers(1, 4))
    order = order_of(device, array)
    cupy.launch(lambda: pytest.fail("waited for what was submitted later"))
    with order.section():
        device.settle(array)
        assert np.array_equal(array.host, numbers(1, 4))


def test_results_whose_use_nobody_knows_are_there(
    monkeypatch: pytest.MonkeyPatch, cupy: FakeCupy, device: CudaDevice
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    own = filled_by_kernel(cupy, numbers(1, 4))
    foreign = SimpleNamespace(__cuda_array_interface__=own.__cuda_array_interface__)
    monkeypatch.setattr(cupy, "asarray", lambda x: own)
    array = open_array(foreign, "f()", "x", writable=True)
    order = Order(device, opened(array))
    with order.section():
        array.flat.fill(3)
    order.wait()
    assert (own.host == 3).all()


def test_memory_of_a_framework_is_used_on_its_stream(
    monkeypatch: pytest.MonkeyPatch, cupy: FakeCupy, device: CudaDevice
) -> None:
    """Also where it has become an array of CuPy's, whose current stream is another."""
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(arrays, "_bridges", [])
    framework = cupy.new_stream("framework")
    arrays.register_bridge(lambda x: False, lambda x: x, lambda gpu: framework.ptr)
    own = cupy.empty((1, 4), np.float32)
    memory = cupy.cuda.UnownedMemory(own.data.ptr, own.nbytes, own)
    array = cupy.ndarray((1, 4), np.float32, cupy.cuda.MemoryPointer(memory, 0))
    place = array.host
    framework.add(lambda: np.copyto(place, numbers(1, 4)))
    order = Order(device, opened(open_array(array, "f()", "x", writable=True)))
    with order.section(device.new_stream()):
        array += 1
    order.wait()
    found = np.empty((1, 4), np.float32)
    framework.add(lambda: np.copyto(found, place))
    framework.synchronize()
    assert np.array_equal(found, numbers(1, 4) + 1)


def test_device_memory_is_not_submitted_without_its_stream(cupy: FakeCupy) -> None:
    with pytest.raises(RuntimeError, match="must name the stream"):
        on_host(np.zeros(2), cupy.empty(3))


# -- the same memory, and numbers from one library to another --------------------------------------


def test_overlap_is_of_intervals(cupy: FakeCupy) -> None:
    whole = cupy.empty((40,), np.float32)
    cases = [
        (whole[:20], whole[10:30], True),
        (whole[10:30], whole[:20], True),
        (whole[:20], whole[20:], False),
        (whole[20:], whole[:20], False),
        (whole[5:6], whole, True),
        (whole[5:5], whole, False),
        (whole.reshape(4, 10)[:, :5], whole[35:], False),
        (whole.reshape(4, 10)[:, :5], whole[34:], True),
        (whole[::-1], whole[:1], True),
        (whole[19::-1], whole[20:], False),
        (whole, cupy.empty((40,), np.float32), False),
        (whole, np.empty(40, np.float32), False),
    ]
    for first, second, expected in cases:
        assert overlap(first, second) is expected
    assert same_place(whole, whole[:3])
    assert not same_place(whole, whole[1:])
    assert not same_place(whole, np.empty(3))


def test_numbers_go_from_any_library_to_any(cupy: FakeCupy) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    for source in (values, cupy.asarray(values), cupy.asarray(values.astype(np.float64))):
        for into in (np.empty((3, 4), np.float32), cupy.empty((3, 4), np.float32)):
            assign(into, source)
            assert np.array_equal(into if isinstance(into, np.ndarray) else into.get(), values)
    wide = cupy.empty((3, 8), np.float32)
    wide.fill(0)
    assign(wide[:, ::2], values)  # with gaps between the elements
    assert np.array_equal(wide.get()[:, ::2], values)
    assert (wide.get()[:, 1::2] == 0).all()


def test_progress_thread_uses_the_bound_device() -> None:
    cupy = FakeCupy(gpus=2)
    device = CudaDevice(1, cupy)
    array = filled_by_kernel(cupy, numbers(1, 50))
    event = device.record()
    seen: list[int] = []

    def communicate() -> None:
        seen.append(cupy.current_device)
        stage(device, event, array, array, double, CHUNK)
        device.activate()
        seen.append(cupy.current_device)

    thread = threading.Thread(target=communicate)
    thread.start()
    thread.join()
    assert seen == [0, 1]
    assert np.array_equal(array.host, 2 * numbers(1, 50))


def test_any_thread_may_record_and_stage() -> None:
    """CUDA's current device is per thread, and a new thread has device 0."""
    cupy = FakeCupy(gpus=2)
    device = CudaDevice(1, cupy)
    errors: list[BaseException] = []

    def communicate() -> None:
        try:
            with cupy.cuda.Device(1):
                array = cupy.empty((2, 50), np.float32)
                compute(cupy, array, numbers(2, 50))
            stage(device, device.record(), array, array, double, CHUNK)
            assert cupy.current_device == 0
            assert np.array_equal(array.host, 2 * numbers(2, 50))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=communicate)
    thread.start()
    thread.join()
    assert not errors


def test_threads_do_not_share_pinned_buffers(cupy: FakeCupy, device: CudaDevice) -> None:
    cupy.use_stream("user")
    arrays = [cupy.asarray(numbers(1, 400)) for _ in range(4)]
    together = threading.Barrier(len(arrays))

    def run(host_in: Any, host_out: Any) -> None:
        together.wait(10)
        host_out *= 2
        together.wait(10)

    threads = [
        threading.Thread(target=stage, args=(device, None, array, array, run, CHUNK))
        for array in arrays
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(array.host, 2 * numbers(1, 400)) for array in arrays)


# -- chunks --------------------------------------------------------------------------------------


def double(host_in: Any, host_out: Any) -> None:
    assert host_in is host_out
    host_out *= 2


def gather(host_in: Any, host_out: Any) -> None:
    host_out.reshape(RANKS, -1)[...] = host_in + 1000 * np.arange(RANKS)[:, None]


def scatter(host_in: Any, host_out: Any) -> None:
    host_out[...] = host_in.reshape(RANKS, -1).sum(0)


def exchange(host_in: Any, host_out: Any) -> None:
    rows = host_in.reshape(RANKS, -1)
    host_out.reshape(RANKS, -1)[...] = rows[::-1]


SHAPES: dict[str, tuple[Callable[[Any, Any], None], int, int]] = {
    "all-gather": (gather, 1, RANKS),
    "reduce-scatter": (scatter, RANKS, 1),
    "all-to-all": (exchange, RANKS, RANKS),
}

# Around one chunk (8 columns of three rows), around the three buffers, and far beyond.
COLUMNS = [0, 1, 7, 8, 9, 16, 17, 23, 24, 25, 31, 100]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("name", SHAPES)
def test_rows_in_and_out(cupy: FakeCupy, device: CudaDevice, name: str, columns: int) -> None:
    run, rows_in, rows_out = SHAPES[name]
    values = numbers(rows_in, columns)
    source = filled_by_kernel(cupy, values)
    target = cupy.empty((rows_out, columns), np.float32)
    expected = np.empty((rows_out, columns), np.float32)
    if columns:
        run(values.reshape(-1), expected.reshape(-1))
    sizes: list[int] = []

    def measured(host_in: Any, host_out: Any) -> None:
        assert host_in.ndim == host_out.ndim == 1
        assert host_in.flags.c_contiguous
        assert host_out.flags.c_contiguous
        sizes.append(max(host_in.nbytes, host_out.nbytes))
        run(host_in, host_out)

    stage(device, device.record(), source, target, measured, CHUNK)
    assert np.array_equal(target.host, expected)
    assert np.array_equal(source.host, values)
    assert len(sizes) == -(-columns // 8)
    assert max(sizes, default=0) <= CHUNK


@pytest.mark.parametrize("columns", [3 * c for c in COLUMNS])
@pytest.mark.parametrize("dtype", ["float32", "int8", "complex128"])
def test_all_reduce_in_place(cupy: FakeCupy, device: CudaDevice, columns: int, dtype: str) -> None:
    values = numbers(1, columns).astype(dtype)
    array = filled_by_kernel(cupy, values)
    stage(device, device.record(), array, array, double, CHUNK)
    assert np.array_equal(array.host, 2 * values)


@pytest.mark.parametrize("columns", [3 * c for c in COLUMNS])
def test_broadcast_copies_only_where_it_must(
    cupy: FakeCupy, device: CudaDevice, columns: int
) -> None:
    values = numbers(1, columns)
    sent: list[Any] = []
    root = filled_by_kernel(cupy, values)
    stage(device, device.record(), root, None, lambda host, _: sent.append(host.copy()), CHUNK)
    assert not any(entry[0] == "upload" for entry in cupy.log)
    assert np.array_equal(np.concatenate([*sent, []]), values[0])

    cupy.log.clear()
    other = filled_by_kernel(cupy, 0 * values)
    arriving = iter(sent)

    def receive(host_in: Any, host_out: Any) -> None:
        host_out[...] = next(arriving)

    stage(device, device.record(), None, other, receive, CHUNK)
    assert not any(entry[0] == "download" for entry in cupy.log)
    assert np.array_equal(other.host, values)


def test_gather_in_place(cupy: FakeCupy, device: CudaDevice) -> None:
    """The source is this rank's row of the target."""
    target = filled_by_kernel(cupy, numbers(RANKS, 100))
    expected = numbers(RANKS, 100)[1] + 1000 * np.arange(RANKS)[:, None]
    stage(device, device.record(), target[1:2], target, gather, CHUNK)
    assert np.array_equal(target.host, expected)


def test_one_element_wider_than_a_chunk(cupy: FakeCupy, device: CudaDevice) -> None:
    array = filled_by_kernel(cupy, numbers(1, 5).astype(np.complex128))
    stage(device, device.record(), array, array, double, chunk_bytes=4)
    assert np.array_equal(array.host, 2 * numbers(1, 5))


def test_rows_too_far_apart_for_one_copy(
    monkeypatch: pytest.MonkeyPatch, cupy: FakeCupy, device: CudaDevice
) -> None:
    monkeypatch.setattr(device_module, "_MAX_PITCH", 100)
    test_rows_in_and_out(cupy, device, "all-to-all", 100)
    assert {entry[2] for entry in cupy.log if entry[0] in ("upload", "download")} == {1}


def test_next_chunk_is_fetched_before_the_collective_runs(
    cupy: FakeCupy, device: CudaDevice
) -> None:
    array = filled_by_kernel(cupy, numbers(1, 5 * 24))
    runs = iter(range(5))

    def run(host_in: Any, host_out: Any) -> None:
        cupy.log.append(("run", next(runs)))
        host_out *= 2

    stage(device, device.record(), array, array, run, CHUNK)
    steps = [entry[0] for entry in cupy.log if entry[0] in ("download", "run", "upload")]
    first = ["download", "download", "run", "upload"]
    assert steps == [*first, *["download", "run", "upload"] * 3, "run", "upload"]
    # The two directions are on streams of their own, and neither is the user's or the default.
    directions = {entry[0]: entry[-1] for entry in cupy.log if entry[0] in ("download", "upload")}
    assert directions["download"] != directions["upload"]
    assert not {"user", "default0"} & set(directions.values())


def test_pinned_memory_is_bounded_and_used_again(cupy: FakeCupy, device: CudaDevice) -> None:
    chunk = 64 * 1024
    array = cupy.asarray(numbers(1, 1_000_000))
    for _ in range(3):
        stage(device, None, array, array, double, chunk)
    assert [entry for entry in cupy.log if entry[0] == "pinned"] == [("pinned", chunk)] * 3


# -- errors --------------------------------------------------------------------------------------


def test_error_of_the_collective_comes_out_after_the_streams_are_quiet(
    cupy: FakeCupy, device: CudaDevice
) -> None:
    array = filled_by_kernel(cupy, numbers(1, 200))
    calls: list[int] = []

    def run(host_in: Any, host_out: Any) -> None:
        if len(calls) == 2:
            raise RuntimeError("MPI_ERR_PROC_FAILED")
        calls.append(1)
        host_out *= 2

    with pytest.raises(RuntimeError, match="MPI_ERR_PROC_FAILED"):
        stage(device, device.record(), array, array, run, CHUNK)
    communication = [s for s in cupy._streams.values() if s.name != "user"]
    assert all(stream.done == len(stream.queue) for stream in communication)
    stage(device, None, array, array, double, CHUNK)  # and the buffers can be used again
    assert np.array_equal(array.host[0, -20:], 2 * numbers(1, 200)[0, -20:])


def test_error_of_a_copy_comes_out(cupy: FakeCupy, device: CudaDevice) -> None:
    cupy.fail_copies = True
    array = cupy.asarray(numbers(1, 200))
    with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
        stage(device, None, array, array, double, CHUNK)


# -- CUDA-aware MPI ------------------------------------------------------------------------------


class OtherRanks:
    """A communicator on which the other ranks have answered already."""

    def __init__(self, *others: CudaAwareness | None) -> None:
        self._others = others

    def allgather(self, own: Any) -> list[Any]:
        return [own, *self._others]


def group(*others: CudaAwareness | None, local_rank: int = 0) -> Any:
    return SimpleNamespace(size=1 + len(others), local_rank=local_rank, comm=OtherRanks(*others))


def probed(enabled: bool) -> Callable[[CudaDevice], CudaAwareness]:
    return lambda _: CudaAwareness(enabled, "probed")


def never(_: CudaDevice) -> CudaAwareness:
    pytest.fail("probed")


YES, NO = CudaAwareness(True, "probed"), CudaAwareness(False, "crashed")


@pytest.mark.parametrize(("wish", "enabled"), [("0", False), ("1", True)])
def test_override_of_awareness(
    monkeypatch: pytest.MonkeyPatch, device: CudaDevice, wish: str, enabled: bool
) -> None:
    monkeypatch.setenv("MPIZERO_CUDA_AWARE", wish)
    found = cuda_aware(group(), device, never)
    assert found == CudaAwareness(enabled, f"MPIZERO_CUDA_AWARE={wish} says so")


@pytest.mark.parametrize("wish", ["yes", "2", "true", " "])
def test_wrong_override_of_awareness(
    monkeypatch: pytest.MonkeyPatch, device: CudaDevice, wish: str
) -> None:
    monkeypatch.setenv("MPIZERO_CUDA_AWARE", wish)
    with pytest.raises(ArgumentError, match=r"MPIZERO_CUDA_AWARE.*allowed: 0, 1"):
        cuda_aware(group(), device, never)


def test_host_is_never_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not cuda_aware(group(), HostDevice(), never).enabled
    monkeypatch.setenv("MPIZERO_CUDA_AWARE", "1")
    assert not cuda_aware(group(), HostDevice(), never).enabled


@pytest.mark.parametrize(
    ("others", "own", "enabled", "reason"),
    [
        ((None, YES, None), True, True, "rank 0: probed"),
        ((None, NO, None), True, False, "rank 2: crashed"),
        ((None, YES, None), False, False, "rank 0: probed"),
        ((YES, NO), False, False, "rank 0: probed"),
    ],
)
def test_worst_answer_of_all_nodes(
    device: CudaDevice, others: Any, own: bool, enabled: bool, reason: str
) -> None:
    assert cuda_aware(group(*others), device, probed(own)) == CudaAwareness(enabled, reason)


def test_one_rank_per_node_probes(device: CudaDevice) -> None:
    assert cuda_aware(group(YES, local_rank=1), device, never) == CudaAwareness(
        True, "rank 1: probed"
    )


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed .SIGSEGV"),
        ("import sys; sys.exit('MPI_Sendrecv gave wrong numbers')", "wrong numbers"),
        ("raise RuntimeError('MPI_ERR_BUFFER')", "exit status 1.*MPI_ERR_BUFFER"),
        ("print('fine')", "exit status 0"),
        ("import time; time.sleep(60)", "no answer within 0.5 s"),
    ],
)
def test_failing_probe(device: CudaDevice, program: str, reason: str) -> None:
    seconds = 0.5 if "sleep" in program else 60
    found = probe_in_child(device, (sys.executable, "-c", program), seconds)
    assert not found.enabled
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.reason)


def test_program_that_cannot_start(device: CudaDevice) -> None:
    assert "could not be started" in probe_in_child(device, ("/nonexistent/python",)).reason


CHILD = """
import sys
from support.fake_cuda import FakeCupy
from mpizero.memory import cuda_aware

sys.modules["cupy"] = FakeCupy(gpus=2)
if {broken}:
    cuda_aware._exchanges = lambda mpi: {{"MPI_Allreduce": lambda sent, received: None}}
cuda_aware.transfer(1)
"""


@pytest.mark.parametrize("broken", [False, True], ids=["right", "wrong numbers"])
def test_child_transfers_with_a_real_mpi(
    monkeypatch: pytest.MonkeyPatch, device: CudaDevice, broken: bool
) -> None:
    """To MPI, the stand-in's "device" memory is as good as CUDA-aware. Even inside a job."""
    for name in ("PMI_RANK", "PMI_SIZE", "PMI_FD", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("MPI4PY_RC_INITIALIZE", "0")
    command = (sys.executable, "-c", CHILD.format(broken=broken))
    found = probe_in_child(device, command)
    assert found.enabled is not broken, found.reason
    assert ("wrong numbers" in found.reason) is broken


def test_child_environment_names_no_rank_but_keeps_settings() -> None:
    job = {
        "PMI_RANK": "1", "PMI_FD": "9", "PMIX_NAMESPACE": "x", "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_MCA_num_procs": "4", "SLURM_PROCID": "1", "MPI_LOCALRANKID": "1", "PALS_RANKID": "1",
        "HYDRA_HOST_FILE": "h", "HYDI_CONTROL_FD": "7", "MPI4PY_RC_INITIALIZE": "0",
    }  # fmt: skip
    settings = {"OMPI_MCA_pml": "ucx", "UCX_TLS": "cuda,sm", "MPICH_GPU_SUPPORT_ENABLED": "1"}
    kept = awareness.singleton_environment({**job, **settings, "PATH": "/bin"})
    assert set(kept) == {*settings, "PATH", "PYTHONPATH"}
    assert set(sys.path) - {""} <= set(kept["PYTHONPATH"].split(os.pathsep))


# -- the real thing ------------------------------------------------------------------------------


def real_gpu() -> Any:
    try:
        device = bind_device(0)
    except ArgumentError:
        return None
    return device if isinstance(device, CudaDevice) else None


needs_gpu = pytest.mark.skipif(real_gpu() is None, reason="needs CuPy and a GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("columns", [1, 1_000_000, 10_000_001])
def test_gpu_staging(columns: int) -> None:
    cupy = importlib.import_module("cupy")
    device = real_gpu()
    with cupy.cuda.Stream(non_blocking=True):
        array = cupy.zeros((1, columns), cupy.float32)
        for _ in range(200):  # long enough that a missing wait would be seen
            array += 1
        event = device.record()
    stage(device, event, array, array, double)
    assert (device.to_host(array) == 400).all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", SHAPES)
def test_gpu_rows(name: str) -> None:
    cupy = importlib.import_module("cupy")
    device = real_gpu()
    run, rows_in, rows_out = SHAPES[name]
    values = np.random.default_rng(0).random((rows_in, 3_000_001), np.float32)
    target = cupy.empty((rows_out, values.shape[1]), cupy.float32)
    expected = np.empty(target.shape, np.float32)
    run(values.reshape(-1), expected.reshape(-1))
    source = cupy.asarray(values)
    stage(device, device.record(), source, target, run)
    np.testing.assert_allclose(device.to_host(target), expected, rtol=1e-6)


@pytest.mark.gpu
@needs_gpu
def test_gpu_probe_answers() -> None:
    """Which answer is right depends on the MPI; that there is one, and no crash here, does not."""
    assert "no answer" not in probe_in_child(real_gpu()).reason

"""The part of torch's suite that is about DistributedDataParallel, with torch's or with ours.

Most of these tests want a GPU for each rank, though few need one: ``cuda`` is taken for the CPU
there, with both. What does need a GPU fails with both.
"""

from __future__ import annotations

import inspect
import unittest
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.parallel import distributed as torchs
from torch.overrides import TorchFunctionMode
from torch.testing._internal import common_distributed

_NAME = "DistributedDataParallel"

Decorator = Callable[[Any], Any]


def is_about_ddp(test: Any, owner: type, module: dict[str, Any]) -> bool:
    """Does a test make a DistributedDataParallel, itself or by a function that it calls?"""
    seen: set[str] = set()
    left = _names(test)
    while left:
        name = left.pop()
        if name == _NAME:
            return True
        if name not in seen:
            seen.add(name)
            left |= _names(vars(owner).get(name, module.get(name)))
    return False


def _names(function: Any) -> set[str]:
    """Every name that a function of the suite's uses."""
    inner = inspect.unwrap(function) if isinstance(function, FunctionType) else None
    codes = [inner.__code__] if inner is not None else []
    names: set[str] = set()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
    return names


@contextmanager
def without_gpus(ranks: int) -> Iterator[None]:
    """While the suite is imported: a rank is as good as a GPU to it."""

    def skip_if_lt_x_gpu(number: int, **_: Any) -> Decorator:
        if number > ranks:
            return unittest.skip(f"Test requires world size of {number}")
        return lambda test: test

    def skip_if_no_gpu(test: Any) -> Any:
        return test

    with ExitStack() as stack:
        for decorator in (skip_if_lt_x_gpu, skip_if_no_gpu):
            stack.enter_context(patch.object(common_distributed, decorator.__name__, decorator))
        yield


@contextmanager
def replaced(suite: Any, wrapper: type[torch.nn.Module], ranks: int) -> Iterator[None]:
    """Run tests on the CPU with ``wrapper`` for torch's DistributedDataParallel."""
    taken = _without_device_ids(wrapper)
    with ExitStack() as stack:
        for module in (suite, torch.nn.parallel, torchs):
            stack.enter_context(patch.object(module, _NAME, taken))
        for name in ("set_device", "synchronize"):
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, **__: None))
        stack.enter_context(patch.object(torch.cuda, "device_count", lambda: ranks))
        stack.enter_context(patch.object(torch.cuda, "current_device", lambda: 0))
        stack.enter_context(_CudaIsCpu())
        yield


def _without_device_ids(wrapper: Any) -> Any:
    """The class for modules on the CPU, which have no device to name."""

    class OnCpu(wrapper):  # type: ignore[misc]
        def __init__(
            self, module: Any, device_ids: Any = None, output_device: Any = None, **others: Any
        ) -> None:
            super().__init__(module, **others)

    OnCpu.__name__, OnCpu.__qualname__ = wrapper.__name__, wrapper.__qualname__
    OnCpu.__module__ = torchs.__name__  # where pickle finds it
    return OnCpu


# Functions whose arguments by position may be a device, or its number.
_TAKE_A_DEVICE = (torch.Tensor.to, torch._C._nn._parse_to)
_CPU = torch.device("cpu")


class _CudaIsCpu(TorchFunctionMode):
    """Whatever is asked for on a GPU is made on the CPU, or stays there."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.device:
            return _CPU if _is_gpu(args[0]) else function(*args)
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = _CPU
        if function in _TAKE_A_DEVICE:
            args = tuple(_CPU if _is_gpu(each) else each for each in args)
        return function(*args, **kwargs)


def _is_gpu(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)

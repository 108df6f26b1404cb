"""What ``mpizero plan`` wants to know of a torch model, which is built without memory."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mpizero import ArgumentError
from mpizero.plan import Model
from mpizero_torch.sharding.units import find_units
from mpizero_torch.sharding.zero import SEGMENT_MB


def model_of(name: str, precision: str = "fp32") -> Model:
    """Build the model that ``module:function`` makes, on the meta device, and describe it.

    The function takes no arguments. It returns a module, or a module and the inputs of its forward
    for one micro-batch (a tensor or a tuple, made on the default device): forward is then run
    without computing anything, to count what it keeps for backward and how much it computes. Raises
    ArgumentError for a name, or a result, that is none of this.
    """
    build = _find(name)
    with torch.device("meta"), _explained(f"{name}()"):
        built = build()
    model, inputs = built if isinstance(built, tuple) and len(built) == 2 else (built, None)
    if not isinstance(model, nn.Module) or not any(True for _ in model.parameters()):
        raise ArgumentError(
            "plan", "model", f"{name}, which returns a {type(model).__name__}",
            "a function that returns a torch module with parameters, or (module, inputs)",
        )  # fmt: skip
    counts = [parameter.numel() for parameter in model.parameters()]
    units = find_units(model, int(SEGMENT_MB * 2**20))
    activations = flops = None
    if inputs is not None:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        with _explained(f"forward of {name}()'s model"):
            activations, flops = _count(model, given, precision)
    return Model(
        parameters=sum(counts),
        tensors=len(counts),
        largest=max(counts),
        unit=max(sum(p.numel() for p in parameters) for _, _, parameters in units),
        units=len(units),
        buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        activation_bytes=activations,
        flops=flops,
    )


def _find(name: str) -> Callable[[], Any]:
    """The function ``module:function``; modules of the working folder are found too."""
    module_name, _, function = name.partition(":")
    allowed = "module:function, such as train:build_model"
    if not module_name or not function:
        raise ArgumentError("plan", "model", repr(name), allowed)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ArgumentError("plan", "model", f"{name!r} ({error})", allowed) from None
    for part in function.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ArgumentError("plan", "model", f"{name!r}, which is not a function", allowed)
    build: Callable[[], Any] = found
    return build


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """The user's code may do what cannot be done without values."""
    try:
        yield
    except Exception as error:
        raise ArgumentError(
            "plan", "model", f"such that {what} raised {type(error).__name__}: {error}",
            "one that can be built and run on torch's meta device, where tensors have no values",
        ) from error  # fmt: skip


def _count(model: nn.Module, inputs: tuple[Any, ...], precision: str) -> tuple[int, float]:
    """Bytes that forward keeps for backward, and operations of both.

    Backward computes two products where forward computes one (Chowdhery et al. 2022, arXiv
    2204.02311, appendix B).
    """
    if precision == "bf16":
        model = model.bfloat16()
        inputs = tuple(
            x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in inputs
        )
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    counter = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter:
        output = model(*inputs)
    del output
    return sum(storage.nbytes() for storage in kept.values()), 3.0 * counter.get_total_flops()

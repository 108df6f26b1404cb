"""Which optimizers may be given slices of parameters, and which need them whole."""

from __future__ import annotations

import torch

from mpizero import ArgumentError
from mpizero.engine import FLAT, PARAMETER

# These treat every element on its own, so that a slice is updated as the whole would be. Only the
# classes themselves: what a subclass does is not known.
_ELEMENT_WISE = {
    "SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta", "Rprop",
    "ASGD",
}  # fmt: skip

# These look at the shape of a parameter, but at one parameter at a time.
_BY_PARAMETER = {"Adafactor", "Muon"}

# These look at all parameters at once, or at gradients of another form.
_REFUSED = {
    "LBFGS": "its direction depends on all parameters at once",
    "SparseAdam": "it wants sparse gradients",
}


def choose_partition(
    optimizer: torch.optim.Optimizer, partition: str, are_cut: bool = False
) -> str:
    """FLAT or PARAMETER for ``optimizer``; ``partition`` is the user's wish, or "auto".

    ``are_cut``: tensor parallelism has cut parameters up, so that none here is whole.

    Raises ArgumentError where that is not known to be right.
    """
    kind = type(optimizer)
    name = kind.__name__ if kind.__module__.startswith("torch.optim") else ""
    if name in _REFUSED:
        raise ArgumentError(
            "zero()", "optimizer", f"torch.optim.{name}", "one that can be sharded",
            f"{name} cannot: {_REFUSED[name]}. Use DistributedDataParallel.",
        )  # fmt: skip
    if are_cut and (name in _BY_PARAMETER or (partition == PARAMETER and not name)):
        raise ArgumentError(
            "zero()", "optimizer", f"a {kind.__qualname__}, for parameters that tensor parallelism "
            "has cut up", "one that treats every element on its own",
            "It would take a slice for the parameter. Use DistributedDataParallel.",
        )  # fmt: skip
    if partition not in ("auto", FLAT, PARAMETER):
        raise ArgumentError("zero()", "partition", repr(partition), "auto, flat, parameter")
    if partition == FLAT and name in _BY_PARAMETER:
        raise ArgumentError(
            "zero()", "partition", f"'flat' for torch.optim.{name}", "auto, parameter",
            f"{name} looks at the shape of a parameter.",
        )  # fmt: skip
    if partition != "auto":
        return partition
    if name in _ELEMENT_WISE:
        return FLAT
    if name in _BY_PARAMETER:
        return PARAMETER
    raise ArgumentError(
        "zero()", "partition", f"'auto' for a {kind.__module__}.{kind.__qualname__}",
        "flat, parameter",
        "It is not known how this optimizer treats its parameters. If every element on its own "
        "(as Adam does): partition='flat'. If each parameter on its own (norms, factors, matrices "
        "of one parameter): partition='parameter'. If it looks at several at once (a norm of all "
        "gradients, for instance), it cannot be sharded. mz.verify() shows whether it is right.",
    )  # fmt: skip

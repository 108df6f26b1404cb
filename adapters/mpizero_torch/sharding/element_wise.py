"""Which optimizers may be given slices of parameters, and which need them whole."""

from __future__ import annotations

import torch

from mpizero import ArgumentError
from mpizero.engine import FLAT, PARAMETER

# By package. These treat every element on its own, so that a slice is updated as the whole would
# be. Only the classes themselves: what a subclass does is not known.
_ELEMENT_WISE = {
    "torch": {
        "SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta",
        "Rprop", "ASGD",
    },
    "schedulefree": {"AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"},
}  # fmt: skip

# These look at the shape of a parameter, but at one parameter at a time.
_BY_PARAMETER = {"torch": {"Adafactor", "Muon"}}

# These look at all parameters at once, or at gradients of another form.
_AT_ONCE = "its step size comes from all parameters at once"
_REFUSED = {
    "torch": {
        "LBFGS": "its direction depends on all parameters at once",
        "SparseAdam": "it wants sparse gradients",
    },
    "prodigyopt": {"Prodigy": _AT_ONCE},
    "dadaptation": {f"DAdapt{name}": _AT_ONCE for name in ("Adam", "SGD", "AdaGrad", "Lion")},
}


def choose_partition(
    optimizer: torch.optim.Optimizer, partition: str, parts: int, are_cut: bool = False
) -> str:
    """FLAT or PARAMETER for ``optimizer``; ``partition`` is the user's wish, or "auto".

    ``parts``: how many ranks share the state; ``are_cut``: tensor parallelism has cut parameters
    up, so that none here is whole.

    Raises ArgumentError where that is not known to be right.
    """
    kind = type(optimizer)
    name, package = kind.__name__, kind.__module__.partition(".")[0]
    by_parameter = name in _BY_PARAMETER.get(package, ())
    reason = _reason_against(optimizer, parts)
    if reason is not None:
        raise ArgumentError(
            "zero()", "optimizer", f"a {kind.__module__}.{kind.__qualname__}",
            "one that can be sharded", f"{name} cannot: {reason}. Use DistributedDataParallel.",
        )  # fmt: skip
    if are_cut and (by_parameter or (partition == PARAMETER and package != "torch")):
        raise ArgumentError(
            "zero()", "optimizer", f"a {kind.__qualname__}, for parameters that tensor parallelism "
            "has cut up", "one that treats every element on its own",
            "It would take a slice for the parameter. Use DistributedDataParallel.",
        )  # fmt: skip
    if partition not in ("auto", FLAT, PARAMETER):
        raise ArgumentError("zero()", "partition", repr(partition), "auto, flat, parameter")
    if partition == FLAT and by_parameter:
        raise ArgumentError(
            "zero()", "partition", f"'flat' for a {kind.__qualname__}", "auto, parameter",
            f"{name} looks at the shape of a parameter.",
        )  # fmt: skip
    if partition != "auto":
        return partition
    if name in _ELEMENT_WISE.get(package, ()):
        return FLAT
    if by_parameter:
        return PARAMETER
    raise ArgumentError(
        "zero()", "partition", f"'auto' for a {kind.__module__}.{kind.__qualname__}",
        "flat, parameter",
        "It is not known how this optimizer treats its parameters. If every element on its own "
        "(as Adam does): partition='flat'. If each parameter on its own (norms, factors, matrices "
        "of one parameter): partition='parameter'. If it looks at several at once (a norm of all "
        "gradients, for instance), it cannot be sharded. mz.verify() shows whether it is right.",
    )  # fmt: skip


def _reason_against(optimizer: torch.optim.Optimizer, parts: int) -> str | None:
    """Why this optimizer cannot be sharded over so many ranks, if that is known."""
    for kind in type(optimizer).__mro__:
        package = kind.__module__.partition(".")[0]
        reason = _REFUSED.get(package, {}).get(kind.__name__)
        if reason == _AT_ONCE:
            # Alone it sees them all; and it may be told to sum over the ranks by itself.
            sums = all(group.get("fsdp_in_use") for group in optimizer.param_groups)
            if parts == 1 or sums:
                continue
        if reason is not None:
            return reason
    return None

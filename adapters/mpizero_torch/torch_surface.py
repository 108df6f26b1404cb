"""What torch's DistributedDataParallel takes and has, and what becomes of each of these here.

The tables are shown in docs/from-torch-ddp.md, and a test holds them to torch's class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from mpizero import ArgumentError, World
from mpizero_torch.runtime import init

NAME = "DistributedDataParallel()"

ARGUMENTS: Mapping[str, str] = {
    "module": "taken",
    "device_ids": "taken: inputs are moved to that GPU; on the CPU nothing is asked of it",
    "output_device": "taken; as in torch, outputs are where the module leaves them",
    "dim": "refused unless 0: split batches by `mz.shard`",
    "broadcast_buffers": "taken: after each backward pass instead of before each forward",
    "init_sync": "taken: `False` compares and sends nothing at the start",
    "process_group": 'taken if its backend is "mpizero", else refused: use `world=`',
    "bucket_cap_mb": "taken",
    "find_unused_parameters": "always so",
    "check_reduction": "taken; as in torch, it does nothing",
    "gradient_as_bucket_view": "taken; views are the default, `False` gives gradients of their own",
    "static_graph": "taken; what it allows is always allowed",
    "delay_all_reduce_named_params": "refused: buckets are sent as they fill up, see `overlap=`",
    "param_to_hook_all_reduce": "refused: buckets are sent as they fill up, see `overlap=`",
    "mixed_precision": 'refused: use `torch.autocast`, or `mz.zero(precision="bf16")`',
    "device_mesh": 'taken if it has one dimension and the backend "mpizero", else refused: use '
    "`world=mesh.replicas` of `mz.mesh`",
    "skip_all_reduce_unused_params": "always so, for buckets in which no rank trains anything",
    "bucket_cap_mb_list": "refused: use `bucket_cap_mb`, one size for all",
    "batched_grad_copy": "always so",
    "forward_sync_buffers": "taken: `True` sends buffers before each forward, as torch does; "
    "`False` never but at the start",
}

MEMBERS: Mapping[str, str] = {
    "module": "taken",
    "no_sync": "taken",
    "join": "taken; its arguments by name. Averages are over the ranks that still train, or, with "
    "`divide_by_initial_world_size=True`, over all. Its own `optimizer` comes first",
    "require_backward_grad_sync": "taken: to set it is what `no_sync` does",
    "require_forward_param_sync": "taken with `forward_sync_buffers=True`, else always true",
    "will_sync_module_buffers": "taken",
    "broadcast_buffers": "taken, to be read",
    "forward_sync_buffers": "taken, to be read",
    "find_unused_parameters": "taken, to be read",
    "gradient_as_bucket_view": "taken, to be read",
    "static_graph": "taken, to be read",
    "_set_static_graph": "always so",
    "skip_all_reduce_unused_params": "taken, to be read",
    "batched_grad_copy": "taken, to be read",
    "mixed_precision": "taken, to be read: None",
    "device": "taken",
    "device_type": "taken",
    "device_ids": "taken, to be read: None on the CPU",
    "output_device": "taken, to be read: None on the CPU",
    "is_multi_device_module": "always false",
    "dim": "taken, unless the module has an attribute of that name",
    "parameters_to_ignore": "taken",
    "_set_params_and_buffers_to_ignore_for_model": "taken",
    "process_group": "taken if it was given",
    "join_device": "taken",
}

REFUSED: Mapping[str, str] = {
    "process_group": "there is none: `model.world` are the ranks",
    "join_process_group": "`model.world` are the ranks",
    "join_hook": "use `with model.join(optimizer):` for this model in place of `Join([model])`",
    "_join_config": "use `with model.join(optimizer):` in place of `Join([model])`",
    "register_comm_hook": 'use torch\'s own wrapper on `init_process_group("mpizero")`',
    "_register_builtin_comm_hook": 'use torch\'s own wrapper on `init_process_group("mpizero")`',
    "_register_buffer_comm_hook": 'use torch\'s own wrapper on `init_process_group("mpizero")`',
    "_register_fused_optim": "take the step in a parameter's "
    "`register_post_accumulate_grad_hook`, which is called with the average",
    "_update_process_group": "wrap `model.module` anew, with `world=`",
    "_get_ddp_logging_data": "use `mz.trace` for times, `model.bucket_bytes` for sizes",
    "_set_ddp_runtime_logging_sample_rate": "use `mz.trace`",
    "logger": "use `mz.trace`",
    "reducer": "gradients are averaged by hooks of its own; see `bucket_bytes`",
    "scatter": "move inputs by `.to(device)`, split batches by `mz.shard`",
    "gather": "use `world.allgather`",
    "to_kwargs": "move inputs by `.to(device)`",
    "modules_buffers": "use `model.buffers()`",
    "named_module_buffers": "use `model.named_buffers()`",
    "bucket_bytes_cap": "use `model.bucket_bytes`",
    "bucket_bytes_cap_default": "use `model.bucket_bytes`",
    "bucket_bytes_cap_list": "use `model.bucket_bytes`",
    "broadcast_bucket_size": "buffers are packed by 4 MiB",
    "use_side_stream_for_tensor_copies": "move inputs by `.to(device, non_blocking=True)`",
}


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise ArgumentError for what asks for something else than the default, and is not done."""
    for argument in (
        "delay_all_reduce_named_params",
        "param_to_hook_all_reduce",
        "mixed_precision",
        "bucket_cap_mb_list",
    ):
        if given[argument] is not None:
            raise _not_taken(argument, f"a {type(given[argument]).__name__}", "None")
    if given["dim"] != 0:
        raise _not_taken("dim", repr(given["dim"]), "0")
    cap = given["bucket_cap_mb"]
    if cap is not None and not cap > 0:
        raise ArgumentError(NAME, "bucket_cap_mb", str(cap), "a number > 0")


def _not_taken(argument: str, given: str, allowed: str) -> ArgumentError:
    remedy = ARGUMENTS[argument].partition(": ")[2].replace("`", "")
    return ArgumentError(NAME, argument, given, allowed, f"{remedy[:1].upper()}{remedy[1:]}.")


def world_of(world: World | None, process_group: Any, device_mesh: Any) -> World:
    """The ranks that were given, in whichever of three ways; ``mz.init()``'s by default."""
    given = {"world": world, "process_group": process_group, "device_mesh": device_mesh}
    several = [name for name, each in given.items() if each is not None]
    if len(several) > 1:
        raise ArgumentError(NAME, several[1], f"given beside {several[0]}", "one of them")
    if device_mesh is not None:
        is_part = getattr(device_mesh, "_get_root_mesh", lambda: device_mesh)() != device_mesh
        if device_mesh.ndim != 1 or is_part:
            kind = "a part of a larger mesh" if is_part else f"one of {device_mesh.ndim} dimensions"
            raise _not_taken("device_mesh", kind, "a mesh of one dimension")
        return _of_group("device_mesh", device_mesh.get_group(0))
    if process_group is not None:
        return _of_group("process_group", process_group)
    return world if world is not None else init()


def _of_group(argument: str, group: Any) -> World:
    # Imported where there is a group: torch's own part for it takes a while.
    from mpizero_torch.distributed import MpiProcessGroup

    if isinstance(group, MpiProcessGroup):
        return group.world
    if isinstance(group, torch.distributed.ProcessGroup):
        given = f"one with the backend {torch.distributed.get_backend(group)!r}"
    else:
        given = f"a {type(group).__name__}, of which this process is no member, or no group"
    raise ArgumentError(
        NAME, argument, given, 'None, or what is made with init_process_group("mpizero")',
        "Ranks are given as world=, by default those of mz.init().",
    )  # fmt: skip


def check_device_ids(device_ids: Any, output_device: Any, device: torch.device) -> Any:
    """The (device_ids, output_device) that hold for a module on ``device``, as torch has them."""
    if device_ids is not None and len(device_ids) > 1:
        raise ArgumentError(
            NAME, "device_ids", str(list(device_ids)), "one device: each rank has its own",
            "Start one rank for each GPU.",
        )  # fmt: skip
    if not device_ids or device.type == "cpu":
        return None, None
    wanted = torch.device(device_ids[0]) if isinstance(device_ids[0], str) else device_ids[0]
    index = wanted.index if isinstance(wanted, torch.device) else int(wanted)
    if index is not None and index != device.index:
        raise ArgumentError(
            NAME, "device_ids", str(list(device_ids)), f"the module's device, {device}",
            "Move the module there first: module.to(world.device.name).",
        )  # fmt: skip
    out = device.index if output_device is None else output_device
    return [device.index], out.index if isinstance(out, torch.device) else out


def check_module(named: list[tuple[str, torch.Tensor]], function: str = NAME) -> None:
    """Raise ArgumentError for a module that is not ready: lazy, or with tensors without memory."""
    for name, tensor in named:
        if nn.parameter.is_lazy(tensor):
            raise ArgumentError(
                function, "module", f"one whose '{name}' is not initialised (a lazy module's)",
                "a module whose parameters have their shapes",
                "Let a dummy batch go through it first, on all ranks.",
            )  # fmt: skip
        if tensor.layout != torch.strided:
            raise ArgumentError(
                function, "module", f"one whose '{name}' is sparse ({tensor.layout})",
                "dense tensors",
                f"Make it dense, or leave it out: module._ddp_params_and_buffers_to_ignore = "
                f"['{name}'].",
            )  # fmt: skip


def moved(inputs: Any, device: torch.device) -> Any:
    """Inputs, in whatever containers, on a device."""
    return tree_map(
        lambda each: each.to(device) if isinstance(each, torch.Tensor) else each, inputs
    )


def lacking(model: nn.Module, inner: nn.Module, name: str) -> AttributeError:
    """The error about an attribute that neither a wrapper nor its module has."""
    of_torch = hasattr(nn.parallel.DistributedDataParallel, name)
    own = type(model).__name__
    if name in REFUSED:
        text = f"{own} has no '{name}', which torch's has: {REFUSED[name].replace('`', '')}."
    elif of_torch:
        text = f"{own} has no '{name}': it is private to torch's own DistributedDataParallel."
    else:
        text = f"neither {own} nor its module, a {type(inner).__name__}, has '{name}'."
    return AttributeError(text, name=name, obj=model)


def table() -> str:
    """The tables of the documentation: what torch has, and what becomes of it."""
    refused = {name: f"refused: {text}" for name, text in REFUSED.items() if name not in MEMBERS}
    parts = []
    for head, rows in (("argument", ARGUMENTS), ("attribute, method", {**MEMBERS, **refused})):
        lines = [f"| {head} | here |", "|---|---|"]
        lines += [f"| `{name}` | {text} |" for name, text in rows.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)

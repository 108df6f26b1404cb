"""Runs of torch's autograd engine: when one ends, and whether it computes all that it could.

``backward()`` and ``autograd.grad()`` are runs alike; a reentrant checkpoint starts one within
another. What has begun in a run is finished when it ends, in an order that all ranks share.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

# By the number of a run that is under way: who wants to know of its end.
_waiting: dict[int, list[tuple[int, weakref.WeakMethod[Callable[[], None]]]]] = {}


def current_run() -> int:
    """The number of the run under way in this thread; -1 outside of one."""
    return int(torch._C._current_graph_task_id())


def at_end(order: int, finish: Callable[[], None]) -> int:
    """Call the method ``finish`` when the run under way ends well; return the run's number.

    All that wait for one run are called in their ``order``: gradients may reach several models in
    another order on each rank, but what they send at the end must match.
    """
    run = current_run()
    if run not in _waiting:
        _waiting[run] = []
        # The engine's own way to run something at the end; torch's DDP uses it too.
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _finish(run))
    # Weakly: a run that ends with an exception tells nobody.
    _waiting[run].append((order, weakref.WeakMethod(finish)))
    return run


def forget(run: int) -> None:
    """The run has ended with an exception."""
    _waiting.pop(run, None)


def _finish(run: int) -> None:
    for _, found in sorted(_waiting.pop(run, []), key=lambda each: each[0]):
        finish = found()
        if finish is not None:
            finish()


def is_for(parameters: Collection[torch.Tensor], node: Any) -> bool:
    """Was the run under way asked for gradients of these parameters, whether or not they get any?

    A plain ``backward()`` asks for those of all; ``backward(inputs=[...])`` for some;
    ``autograd.grad`` for none that stay. ``node``: where the run came by.
    """
    asked = _of_this_thread()
    if asked is None:
        return _computes_everything(node)
    if not asked.accumulates or not asked.inputs:
        return asked.accumulates
    ours = set(map(id, parameters))
    return any(
        id(each if isinstance(each, torch.Tensor) else getattr(each.node, "variable", None)) in ours
        for each in asked.inputs
    )


def _computes_everything(node: Any) -> bool:
    """Does the run under way compute all gradients behind ``node``?

    So it looks from a thread of the engine's own, where nobody can be seen to have asked.
    """
    seen, ahead = {node}, [node]
    while ahead:
        for following, _ in ahead.pop().next_functions:
            if following is None or following in seen:
                continue
            try:
                if not torch._C._will_engine_execute_node(following):
                    return False
            except RuntimeError:  # a tensor that autograd.grad() was asked for
                return False
            seen.add(following)
            ahead.append(following)
    return True


def _of_this_thread() -> Run | None:
    """The innermost run that this thread has asked for."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if _asks(frame):
            return _run_of(frame)
        frame = frame.f_back
    return None


def _asks(frame: FrameType) -> bool:
    """Is it the call by which torch starts its engine?"""
    code = frame.f_code
    return code.co_name == "_engine_run_backward" and code.co_filename.endswith("graph.py")


def is_nested() -> bool:
    """Has the run under way been started by a node of another one (a reentrant checkpoint)?"""
    frame = sys._getframe()
    inside = False
    while frame.f_back is not None:
        frame = frame.f_back
        where, name = frame.f_code.co_filename, frame.f_code.co_name
        if _asks(frame):
            if inside:
                return True
            inside = True
        elif inside and name == "apply" and where.endswith("function.py"):
            return True  # a Function's backward, perhaps on a thread of its own
    return False


def is_distributed() -> bool:
    """Is it a run of torch's distributed autograd? (Under torch's RPC only.)"""
    rpc = sys.modules.get("torch.distributed.rpc")
    if rpc is None or not rpc.is_available() or not rpc._is_current_rpc_agent_set():
        return False
    try:
        torch._C._distributed_autograd._current_context()
    except RuntimeError:
        return False
    return True


@dataclass(frozen=True)
class Run:
    """What the engine was asked for: gradients of ``roots`` (nodes), for ``inputs`` or all leaves.

    ``accumulates``: into ``.grad``, as backward() does; else they are returned.
    """

    roots: Sequence[Any]
    inputs: Sequence[Any]
    accumulates: bool


def outermost() -> list[Run]:
    """The runs under way in this process's threads, without those within others.

    What computes on a GPU runs on a thread of the engine, while the one that asked for it waits.
    """
    found = []
    for frame in list(sys._current_frames().values()):
        call = None
        inside: FrameType | None = frame
        while inside is not None:
            where, name = inside.f_code.co_filename, inside.f_code.co_name
            if _asks(inside):
                call = inside
            elif call is not None and name == "apply" and where.endswith("function.py"):
                call = None  # asked for by a node of another run, on a thread of the engine
            inside = inside.f_back
        if call is not None:
            found.append(_run_of(call))
    return found


def _run_of(call: FrameType) -> Run:
    asked, given = call.f_locals["t_outputs"], call.f_locals["args"]
    edges = [
        get_gradient_edge(each) if isinstance(each, torch.Tensor) else each
        for each in asked
        if not isinstance(each, torch.Tensor) or each.requires_grad
    ]
    inputs = given[3] if len(given) > 3 and given[3] else ()
    accumulates = bool(call.f_locals["kwargs"].get("accumulate_grad", True))
    return Run([edge.node for edge in edges], list(inputs), accumulates)

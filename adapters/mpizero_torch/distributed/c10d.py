"""torch's own names for what a process group deals in, in one place.

They are typed as anything: torch's stubs describe what C++ offers to callers, not what a Python
subclass of it has to look like.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.distributed_c10d
import torch.distributed.rendezvous

_bindings: Any = torch._C._distributed_c10d

ProcessGroup: Any = _bindings.ProcessGroup
WorkBase: Any = _bindings.Work
PrefixStore: Any = _bindings.PrefixStore
TCPStore: Any = _bindings.TCPStore
ReduceOp: Any = _bindings.ReduceOp
AllgatherOptions: Any = _bindings.AllgatherOptions
AllreduceOptions: Any = _bindings.AllreduceOptions
AllToAllOptions: Any = _bindings.AllToAllOptions
BarrierOptions: Any = _bindings.BarrierOptions
BroadcastOptions: Any = _bindings.BroadcastOptions
GatherOptions: Any = _bindings.GatherOptions
ReduceOptions: Any = _bindings.ReduceOptions
ReduceScatterOptions: Any = _bindings.ReduceScatterOptions
ScatterOptions: Any = _bindings.ScatterOptions

distributed_c10d: Any = torch.distributed.distributed_c10d
rendezvous: Any = torch.distributed.distributed_c10d.__dict__["rendezvous"].__globals__

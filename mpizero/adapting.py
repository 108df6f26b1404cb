"""What an adapter for a framework builds on, beside what users have: the core's one door for it.

An adapter imports ``mpizero`` and this module, and nothing else of the core (import-linter holds it
to that). In here is what a framework has to be told about:

* arrays: ``register_bridge`` lets a framework's own arrays in as numpy or CuPy arrays;
* gradients: ``GradientReducer`` and ``GradientSharder`` average them, once the adapter says which
  are ready, in a ``Lane`` of the ranks; ``Weight`` is how much a rank's count, ``ParameterSpec``
  what the core knows of a parameter;
* sharding: ``balanced_owners`` and the ways to cut parameters among ranks;
* checkpoints: ``Save`` of ``Part``s, and ``Checkpoint``, which any number of ranks reads; ``tree``
  for values that are no arrays;
* data: ``ShardedBatches`` says which samples are a rank's, and how much its batch counts;
* ``operation``, which raises ArgumentError for sums that there are not of a dtype;
* ``thread_level``, for frameworks that call from threads of their own.
"""

from __future__ import annotations

from mpizero.checkpoint import (
    Checkpoint,
    Part,
    PendingSave,
    Piece,
    Save,
    TensorSpec,
    agreed,
    carry_out,
    shared_part,
    tree,
)
from mpizero.engine import (
    GradientReducer,
    GradientSharder,
    Lane,
    ParameterSpec,
    Weight,
    balanced_owners,
    cut_by_parameter,
    cut_flat,
    take_lane,
)
from mpizero.layout import FlatLayout
from mpizero.memory.arrays import register_bridge
from mpizero.reduction.operation import operation
from mpizero.sampling import ShardedBatches
from mpizero.world.startup import thread_level

__all__ = [
    "Checkpoint",
    "FlatLayout",
    "GradientReducer",
    "GradientSharder",
    "Lane",
    "ParameterSpec",
    "Part",
    "PendingSave",
    "Piece",
    "Save",
    "ShardedBatches",
    "TensorSpec",
    "Weight",
    "agreed",
    "balanced_owners",
    "carry_out",
    "cut_by_parameter",
    "cut_flat",
    "operation",
    "register_bridge",
    "shared_part",
    "take_lane",
    "thread_level",
    "tree",
]

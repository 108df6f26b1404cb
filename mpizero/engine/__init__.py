"""The schedule of data-parallel and sharded training, told by an adapter what is ready.

The engine knows arrays, not frameworks: an adapter says "this gradient is ready" and "backward is
over", and gives the places where gradients lie to its framework.
"""

from __future__ import annotations

from mpizero.engine.gradient_shards import Filling, GradientSharder
from mpizero.engine.lanes import Lane, take_lane
from mpizero.engine.opening import MARKS, News
from mpizero.engine.parameter_memory import COMMON, SHARDED, WHOLE, ParameterMemory
from mpizero.engine.partition import (
    FLAT,
    PARAMETER,
    SEGMENT_BYTES,
    Space,
    balanced_owners,
    cut_by_parameter,
    cut_flat,
)
from mpizero.engine.passes import ReducedPasses
from mpizero.engine.reducer import GradientReducer
from mpizero.engine.shard_group import ShardGroup
from mpizero.engine.specs import ParameterSpec
from mpizero.engine.weights import Merge, Weight

__all__ = [
    "COMMON",
    "FLAT",
    "MARKS",
    "PARAMETER",
    "SEGMENT_BYTES",
    "SHARDED",
    "WHOLE",
    "Filling",
    "GradientReducer",
    "GradientSharder",
    "Lane",
    "Merge",
    "News",
    "ParameterMemory",
    "ParameterSpec",
    "ReducedPasses",
    "ShardGroup",
    "Space",
    "Weight",
    "balanced_owners",
    "cut_by_parameter",
    "cut_flat",
    "take_lane",
]

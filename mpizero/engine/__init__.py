"""The schedule of data-parallel training, told by an adapter what is ready.

The engine knows arrays, not frameworks: an adapter says "this gradient is ready" and "backward is
over", and gives the places where gradients lie to its framework.
"""

from __future__ import annotations

from mpizero.engine.buckets import ParameterSpec
from mpizero.engine.reducer import GradientReducer
from mpizero.engine.weights import Weight

__all__ = ["GradientReducer", "ParameterSpec", "Weight"]

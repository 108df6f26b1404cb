"""What torch asks a group's backend for a device: one answer for all devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mpizero_torch.distributed.staging import SharedBuffers

if TYPE_CHECKING:
    from mpizero_torch.distributed.process_group import MpiProcessGroup


class BackendView:
    """A process group in the place of torch's ``Backend``, which Python cannot derive from."""

    supports_splitting = True
    supports_coalescing = False
    supports_time_estimate = False
    supports_shrinking = False

    def __init__(self, group: MpiProcessGroup, buffers: SharedBuffers) -> None:
        self._group, self._buffers = group, buffers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def supports_tensor_alloc(self, device: Any) -> bool:
        """Is there memory of which communication is quicker? On the host, what a node shares."""
        return bool(torch.device(device).type == "cpu")

    def allocate_tensor(
        self, size: Any, *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Such memory, flat and uninitialised. Collective: all ranks ask for the same."""
        if torch.device(device).type != "cpu":
            return torch.empty(size, dtype=dtype, device=device)
        return self._buffers.tensor(int(size), dtype)

    def eager_connect_single_device(self, device: Any) -> None:
        """Nothing: a group is connected when it is made."""

    def perform_nocolor_split(self, device: Any) -> None:
        """Nothing: ranks that are not in a new group take no part in making it."""

    @property
    def options(self) -> None:
        """There are none."""
        return

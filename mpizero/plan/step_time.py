"""The time of a step: the alpha-beta model of messages, and bytes over bandwidth for memory.

A phase that sends b bytes from each node in s messages, one after the other, takes s alpha + b beta
(Thakur, Rabenseifner, Gropp 2005, section 3): alpha the latency of a message, beta the time for a
byte on a node's link, which its ranks share. Summing is part of what goes through memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpizero.plan.job import Machine, Model, Settings
from mpizero.plan.traffic import Phase, Traffic

# Of the time of forward and backward, backward's: two matrix products for each one of forward.
_BACKWARD = 2 / 3


@dataclass(frozen=True)
class StepTime:
    """Seconds. ``compute`` is None where it is not known, and then not in ``total``.

    ``hidden``: how much of the rest a communicating thread does while the ranks compute.
    ``network``: how much of the rest, hidden or not, is spent on the network.
    """

    compute: float | None
    gradients: float
    update: float
    parameters: float
    hidden: float
    network: float

    @property
    def total(self) -> float:
        busy = self.gradients + self.update + self.parameters
        return (self.compute or 0.0) + busy - self.hidden


def step_time(
    model: Model, settings: Settings, machine: Machine, moved: Traffic, stage: int
) -> StepTime | None:
    """Of a step that moves ``moved``; None where that cannot be said.

    It takes the speed of the network, or on one node that of the memory. Where the network is known
    and the memory is not, what goes through memory takes no time.
    """
    if (machine.network_bandwidth if moved.network else machine.memory_bandwidth) is None:
        return None
    compute = compute_seconds(model, settings, machine)
    control = _seconds(moved.control, machine)
    gradients = _seconds(moved.gradients, machine) + control
    update = _seconds(moved.update, machine)
    parameters = _seconds(moved.parameters, machine)
    hidden = 0.0
    if settings.overlap and compute is not None and moved.pieces:
        # The last piece is full when backward is over.
        hidden = min(gradients * (1 - 1 / moved.pieces), compute * _BACKWARD)
        if stage == 3 and not settings.share:  # gathered ahead, but for the first unit
            hidden += min(parameters * (1 - 1 / moved.pieces), compute - hidden)
    phases = (moved.gradients, moved.parameters, moved.control)
    network = sum(_on_network(phase, machine) for phase in phases)
    return StepTime(compute, gradients, update, parameters, hidden, network)


def compute_seconds(model: Model, settings: Settings, machine: Machine) -> float | None:
    """Of a rank's forward and backward on one micro-batch; None where it cannot be said.

    As measured; else from the operations that were counted on the model; else 6 a parameter and
    token, and 12 l h s for attention (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """
    if machine.compute_seconds is not None:
        return machine.compute_seconds
    if machine.flops is None:
        return None
    if model.flops is not None:
        return model.flops / machine.flops
    if not settings.sequence:
        return None
    tokens = settings.sequence * settings.micro_batch
    attention = 12 * model.layers * model.hidden * settings.sequence
    return (6 * model.parameters + attention) * tokens / machine.flops


def _seconds(phase: Phase, machine: Machine) -> float:
    through_memory = phase.memory / machine.memory_bandwidth if machine.memory_bandwidth else 0.0
    return _on_network(phase, machine) + through_memory


def _on_network(phase: Phase, machine: Machine) -> float:
    sent = phase.network / machine.network_bandwidth if machine.network_bandwidth else 0.0
    return phase.messages * machine.latency + sent

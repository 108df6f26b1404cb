"""Parameters that several stages of a pipeline hold: an embedding that is the output layer too.

A parameter whose name several stages have is one parameter. Each of these stages has a copy and
finds a part of its gradient; the parts are summed over the stages before replicas average, so that
all copies take the same steps. (What Megatron-LM does for its embeddings: Narayanan et al. 2021,
arXiv 2104.04473; here by name, for any.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mpizero import ArgumentError, World
from mpizero_torch import building, slices
from mpizero_torch.replicate import broadcast_tensors

Named = Sequence[tuple[str, torch.Tensor]]


class TiedStages:
    """Which of the parameters ``named`` other stages have too. Collective over the stages.

    ``later``: the numbers of those that an earlier stage has, and speaks for. Raises ArgumentError
    for copies that differ in form or have no memory yet.
    """

    def __init__(self, named: Named, world: World) -> None:
        self.later: set[int] = set()
        self.names: list[str] = []
        self._shared: list[tuple[World, list[int]]] = []
        stages = world.mesh.pp if world.mesh is not None else None
        if stages is None or stages.size == 1:
            return
        forms = {name: f"{tensor.dtype}, shape {tuple(tensor.shape)}" for name, tensor in named}
        number = {name: index for index, (name, _) in enumerate(named)}
        everyones = stages.gather_objects(forms)
        sets: dict[tuple[int, ...], list[str]] = {}
        for name in dict.fromkeys(name for each in everyones for name in each):
            holders = tuple(stage for stage, each in enumerate(everyones) if name in each)
            if len(holders) > 1:
                _check(name, {stage: everyones[stage][name] for stage in holders})
                sets.setdefault(holders, []).append(name)
        for holders, names in sets.items():
            among = stages.split(0 if stages.rank in holders else None)
            if among is None:
                continue
            self.names += names
            self._shared.append((among, [number[name] for name in names]))
            if stages.rank != holders[0]:
                self.later.update(number[name] for name in names)
        for name, tensor in named:
            if name in self.names and (tensor.is_meta or building.is_hollow(tensor)):
                raise ArgumentError(
                    "zero()", "model", f"made in mz.deferred(), with '{name}' on several stages",
                    "a model with memory", "Every stage would draw another first value for it.",
                )  # fmt: skip
        for among, indices in self._shared:
            broadcast_tensors([named[index][1] for index in indices], among, root=0)

    def sum(
        self,
        parameters: Sequence[torch.Tensor],
        kept: Callable[[torch.Tensor], torch.Tensor | None],
    ) -> None:
        """Sum gradients over the stages that hold a parameter. Collective over them.

        ``parameters``: those that were ``named``; ``kept(parameter)``: the gradient that this rank
        has, or None. It gets the sum; where no stage has one, none gets one.
        """
        for among, indices in self._shared:
            own = [kept(parameters[index]) for index in indices]
            has = torch.tensor([0.0 if each is None else 1.0 for each in own])
            among.allreduce(has)
            for index, gradient, count in zip(indices, own, has.tolist(), strict=True):
                if count:
                    _sum(parameters[index], gradient, among)


def _sum(parameter: torch.Tensor, gradient: torch.Tensor | None, among: World) -> None:
    if gradient is None:
        shape = slices.box(parameter).sizes
        gradient = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        parameter.grad = slices.wrap(gradient, parameter)
    if gradient.is_contiguous():
        among.allreduce(gradient.detach())
    else:
        whole = gradient.detach().contiguous()
        among.allreduce(whole)
        gradient.copy_(whole)


def _check(name: str, forms: dict[int, str]) -> None:
    if len(set(forms.values())) > 1:
        told = "; ".join(f"stage {stage}: {form}" for stage, form in forms.items())
        raise ArgumentError(
            "DistributedDataParallel()", "module", f"of stages that differ in '{name}' ({told})",
            "one parameter of one form under a name",
            "Stages have the names of the whole model: keep layers in a ModuleDict, by number.",
        )  # fmt: skip

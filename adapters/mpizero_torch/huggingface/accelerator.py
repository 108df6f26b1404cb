"""``Accelerator`` with ``mz.zero`` where its configuration asks for sharding."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import nn

from mpizero import ArgumentError, World
from mpizero_torch.clip import clip_grad_norm_, clip_grad_value_
from mpizero_torch.huggingface.deepspeed_config import Settings
from mpizero_torch.huggingface.optimizer import ZeroOptimizer
from mpizero_torch.huggingface.plugins import settings_of
from mpizero_torch.huggingface.replacing import replace
from mpizero_torch.names import uncompiled
from mpizero_torch.sharding.module import ShardedModule
from mpizero_torch.sharding.zero import zero
from mpizero_torch.wrapper import DistributedModule

_SWITCHES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
# The models that have been sharded, by the plain ones.
_SHARDED: WeakKeyDictionary[nn.Module, DistributedModule] = WeakKeyDictionary()


def shard_where_told(world: World) -> None:
    """Let every Accelerator that is made from now on do so."""

    def construct(before: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(before).bind(self, *args, **kwargs)
        settings = settings_of(bound.arguments, world)
        if settings is None:
            before(self, *args, **kwargs)
            return
        for plugin in ("deepspeed_plugin", "deepspeed_plugins", "fsdp_plugin"):
            bound.arguments.pop(plugin, None)
        bound.arguments["mixed_precision"] = "no"  # the sharded module does that
        with _without(_SWITCHES):
            before(*bound.args, **bound.kwargs)
        self._mpizero = settings
        if settings.accumulation is not None:
            self.gradient_accumulation_steps = settings.accumulation

    replace(Accelerator, "__init__", construct)
    for name, method in _METHODS.items():
        replace(Accelerator, name, method)
    _tell_precision()


def settings_for(accelerator: Any) -> Settings | None:
    """How an Accelerator shards, if it does."""
    found: Settings | None = vars(accelerator).get("_mpizero")
    return found


def sharded(model: nn.Module) -> DistributedModule | None:
    """What has become of a model in ``prepare``, if it has been sharded; None for others."""
    return model if isinstance(model, DistributedModule) else _SHARDED.get(uncompiled(model))


def prepare(before: Any, self: Any, *objects: Any, device_placement: Any = None) -> Any:
    """Shard models that are given together with their optimizers; the rest is Accelerate's."""
    settings = settings_for(self)
    if settings is None:
        return before(self, *objects, device_placement=device_placement)
    ours = _shard(self, settings, objects)
    found = before(self, *ours, device_placement=device_placement)
    for each in self._schedulers:  # a schedule keeps to the optimizer that it was made for
        for optimizer in self._optimizers:
            inner = getattr(optimizer.optimizer, "inner", None)
            if inner is not None and inner is getattr(each.scheduler, "optimizer", None):
                each.optimizers = [optimizer]
    return found


def prepare_model(
    before: Any, self: Any, model: Any, device_placement: Any = None, evaluation_mode: bool = False
) -> Any:
    """A sharded one is prepared; to be evaluated it may stay what is given, plain or not."""
    wrapped = sharded(model)
    if wrapped is None:
        return before(self, model, device_placement, evaluation_mode)
    found = model if evaluation_mode else wrapped
    if not any(each is found for each in self._models):
        self._models.append(found)
    return found


def clip_norm(
    before: Any, self: Any, parameters: Any, max_norm: float, norm_type: float = 2.0
) -> Any:
    """By the norm over all ranks' parts, of a whole model. Collective."""
    settings = settings_for(self)
    if settings is None:
        return before(self, parameters, max_norm, norm_type)
    model = _model_of(self, parameters, "clip_grad_norm_()")
    for optimizer in self._optimizers:
        if getattr(optimizer, "model", None) is model and max_norm != float("inf"):
            optimizer.is_clipped = True
    return clip_grad_norm_(model, max_norm, norm_type)


def clip_value(before: Any, self: Any, parameters: Any, clip_value: float) -> None:
    """Each element, on the rank that has it."""
    if settings_for(self) is None:
        before(self, parameters, clip_value)
    else:
        clip_grad_value_(_model_of(self, parameters, "clip_grad_value_()"), clip_value)


def unwrap(before: Any, self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """The plain module, also of a sharded one."""
    found = before(self, model, *args, **kwargs)
    if isinstance(found, DistributedModule):
        return extract_model_from_parallel(found.module, *args, **kwargs)
    return found


def state_dict(before: Any, self: Any, model: Any, unwrap: bool = True) -> Any:
    """Of whole parameters, as they are trained, on rank 0; empty elsewhere. Collective."""
    found = sharded(model) if settings_for(self) is not None else None
    if not isinstance(found, ShardedModule):
        return before(self, model, unwrap=unwrap)
    return found.state_dict(root=0)


def save_state(before: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """With the optimizers' state put together on rank 0. Collective."""
    return _collected(self._optimizers, lambda: before(self, *args, **kwargs))


@contextmanager
def no_sync(before: Any, self: Any, model: Any) -> Iterator[None]:
    """From stage 2 on gradients are added up in the shards: a rank never holds all of them."""
    settings = settings_for(self)
    if settings is not None and settings.stage >= 2:
        yield
        return
    with before(self, model):
        yield


_METHODS: dict[str, Callable[..., Any]] = {
    "prepare": prepare,
    "prepare_model": prepare_model,
    "clip_grad_norm_": clip_norm,
    "clip_grad_value_": clip_value,
    "unwrap_model": unwrap,
    "get_state_dict": state_dict,
    "save_state": save_state,
    "no_sync": no_sync,
}


def _tell_precision() -> None:
    """``accelerator.mixed_precision``, by which programs choose dtypes, is what is computed in."""
    plain = Accelerator.mixed_precision
    if getattr(plain.fget, "is_ours", False):
        return

    def told(self: Any) -> Any:
        settings = settings_for(self)
        return plain.fget(self) if settings is None else settings.precision

    told.is_ours = True  # type: ignore[attr-defined]
    Accelerator.mixed_precision = property(told)


def _collected(optimizers: Sequence[Any], work: Callable[[], Any]) -> Any:
    """Run this while the states of sharded optimizers are on rank 0."""
    for at, optimizer in enumerate(optimizers):
        if isinstance(optimizer, ZeroOptimizer):
            with optimizer.collected():
                return _collected(optimizers[at + 1 :], work)
    return work()


def _shard(accelerator: Any, settings: Settings, objects: Sequence[Any]) -> list[Any]:
    """The objects, with sharded ones in the place of models and their optimizers."""
    found = list(objects)
    optimizers = [
        (at, each)
        for at, each in enumerate(objects)
        if isinstance(each, torch.optim.Optimizer) and not isinstance(each, ZeroOptimizer)
    ]
    for at, model in enumerate(objects):
        if not isinstance(model, nn.Module) or isinstance(model, DistributedModule):
            continue
        if (before := sharded(model)) is not None:
            _check_again(before, objects)
            found[at] = before
            continue
        ours = {id(parameter) for parameter in model.parameters()}
        its = [(place, each) for place, each in optimizers if _some(each) in ours]
        if not its:
            if any(parameter.requires_grad for parameter in model.parameters()):
                raise _apart("a model without its optimizer")
            continue
        optimizers = [each for each in optimizers if each not in its]
        found[at], made = _sharded(accelerator, settings, model, [each for _, each in its])
        for (place, _), optimizer in zip(its, made, strict=True):
            found[place] = optimizer
    if optimizers:
        raise _apart("an optimizer without its model")
    return found


def _sharded(
    accelerator: Any, settings: Settings, model: nn.Module, optimizers: Sequence[Any]
) -> tuple[Any, list[ZeroOptimizer]]:
    if accelerator.device_placement:
        model.to(accelerator.device)
    dynamo = accelerator.state.dynamo_plugin
    if dynamo.backend.value.lower() != "no":
        model.compile(**dynamo.to_kwargs())  # in place: names stay as they are
    options = dict(settings.options)
    if options.get("offload") == "cpu" and accelerator.device.type == "cpu":
        del options["offload"]  # it is there anyway
    wrapped, made = zero(model, list(optimizers), settings.stage, **options)
    _SHARDED[uncompiled(model)] = wrapped
    zeros = [ZeroOptimizer(each, wrapped, settings.clipping) for each in made]
    for each in (wrapped, *zeros):
        each._is_accelerate_prepared = True
    return wrapped, zeros


def _some(optimizer: torch.optim.Optimizer) -> int:
    """One of its parameters."""
    return next(id(parameter) for group in optimizer.param_groups for parameter in group["params"])


def _check_again(wrapped: DistributedModule, objects: Sequence[Any]) -> None:
    """Of a model that is sharded already, no other optimizer can be made use of."""
    for each in objects:
        if isinstance(each, torch.optim.Optimizer) and getattr(each, "model", None) is not wrapped:
            raise ArgumentError(
                "prepare()", "objects", "a model that is sharded already, with another optimizer",
                "the optimizer that prepare() gave back with it",
                "To begin anew, build the model anew and load its state_dict.",
            )  # fmt: skip


def _apart(given: str) -> ArgumentError:
    return ArgumentError(
        "prepare()", "objects", given, "model and optimizer in one call",
        "They are sharded together: model, optimizer = accelerator.prepare(model, optimizer).",
    )  # fmt: skip


def _model_of(accelerator: Any, parameters: Any, where: str) -> Any:
    """The prepared model that has these parameters, which must be all that it trains."""
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    ids = {id(parameter) for parameter in given}
    for own in [each.model for each in accelerator._optimizers if isinstance(each, ZeroOptimizer)]:
        trained = {id(each) for each in own.parameters() if each.requires_grad}
        if trained and trained <= ids and ids <= {id(each) for each in own.parameters()}:
            return own
    raise ArgumentError(
        where, "parameters", f"{len(given)} parameters that are not all of one prepared model",
        "model.parameters(), of a model that prepare() has sharded",
        "The norm of a part of them is not known; of a single parameter mz.full_gradient(p) has "
        "the gradient.",
    )  # fmt: skip


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """In here these variables are not set."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)

"""``transformers.Trainer`` with sharded models: its arguments, what it saves and loads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace as with_changes
from types import SimpleNamespace
from typing import Any

from transformers import Trainer, TrainingArguments

from mpizero import ArgumentError, World
from mpizero_torch.huggingface.accelerator import settings_for, sharded
from mpizero_torch.huggingface.deepspeed_config import AUTO, Settings, load, read
from mpizero_torch.huggingface.optimizer import ZeroOptimizer
from mpizero_torch.huggingface.replacing import replace
from mpizero_torch.huggingface.sections import build_optimizer, build_schedule
from mpizero_torch.sharding.gathering import gathered
from mpizero_torch.sharding.module import ShardedModule

# "auto" in a schedule: known when training begins.
_LATER = ("total_num_steps", "warmup_num_steps")


def save_and_load_whole(world: World) -> None:
    """Let ``TrainingArguments(deepspeed=...)`` be ours, and every Trainer save whole models."""

    def complete(before: Any, self: Any) -> None:
        config, self.deepspeed = self.deepspeed, None
        before(self)
        _ = self.device  # found while no DeepSpeed is asked for
        self.deepspeed = config
        if config:
            self.deepspeed_plugin = SimpleNamespace(mpizero_settings=_read(self, world))

    replace(TrainingArguments, "__post_init__", complete)
    for name, method in _METHODS.items():
        replace(Trainer, name, method)


def _read(arguments: Any, world: World) -> Settings:
    """What a configuration asks for beside these arguments, which stand for "auto"."""
    micro, steps = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    values = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "train_batch_size": micro * steps * world.size,
        "gradient_clipping": arguments.max_grad_norm,
        "fp16.enabled": arguments.fp16 or arguments.fp16_full_eval,
        "bf16.enabled": arguments.bf16 or arguments.bf16_full_eval,
        "optimizer.params.lr": arguments.learning_rate,
        "optimizer.params.betas": [arguments.adam_beta1, arguments.adam_beta2],
        "optimizer.params.eps": arguments.adam_epsilon,
        "optimizer.params.weight_decay": arguments.weight_decay,
        "scheduler.params.warmup_max_lr": arguments.learning_rate,
    }
    free: dict[str, Any] = {"scheduler.params.warmup_min_lr": 0.0}
    free |= {f"scheduler.params.{name}": AUTO for name in _LATER}
    config = load(arguments.deepspeed)
    for name in ("bf16", "fp16"):  # as Accelerate does where the configuration does not say
        if values[f"{name}.enabled"] and not {"bf16", "fp16"} & config.keys():
            config[name] = {"enabled": True}
    settings = read(config, values, world.size, free)
    # Trainer clips, and accumulates, by itself.
    return with_changes(settings, clipping=None, accumulation=None)


def create_optimizer(before: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """The one of the configuration, of all that is trained, if it has one."""
    settings = settings_for(self.accelerator)
    if settings is None or settings.optimizer is None or isinstance(self.optimizer, ZeroOptimizer):
        return before(self, *args, **kwargs)
    if self.optimizer is not None:
        raise ArgumentError(
            "deepspeed", "optimizer", "a section of the configuration, beside Trainer's own",
            "one of the two",
        )  # fmt: skip
    trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
    self.optimizer = build_optimizer(settings.optimizer, trained)
    return self.optimizer


def create_scheduler(before: Any, self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
    """The one of the configuration, if it has one."""
    settings = settings_for(self.accelerator)
    if settings is None or settings.scheduler is None or self.lr_scheduler is not None:
        return before(self, num_training_steps, optimizer)
    params = dict(settings.scheduler.get("params") or {})
    steps = max(1, self.args.get_warmup_steps(num_training_steps))
    for name, value in zip(_LATER, (num_training_steps, steps), strict=True):
        if params.get(name) == AUTO:
            params[name] = value
    section = {**settings.scheduler, "params": params}
    self.lr_scheduler = build_schedule(section, self.optimizer if optimizer is None else optimizer)
    self._created_lr_scheduler = True
    return self.lr_scheduler


def save_model(before: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """With whole parameters, as they are trained. Collective."""
    wrapped = _sharded(self)
    self._mpizero_whole = None if wrapped is None else wrapped.state_dict(root=0)
    try:
        before(self, *args, **kwargs)
    finally:
        self._mpizero_whole = None


def save(before: Any, self: Any, output_dir: Any = None, state_dict: Any = None) -> None:
    """What ``save_model`` has put together, where nothing else is given."""
    if state_dict is None:
        state_dict = getattr(self, "_mpizero_whole", None)
    before(self, output_dir, state_dict)


def save_optimizer(before: Any, self: Any, output_dir: str) -> None:
    """The plain optimizer's state, on rank 0, which writes it. Collective."""
    ours = isinstance(self.optimizer, ZeroOptimizer)
    with self.optimizer.collected() if ours else nullcontext():
        before(self, output_dir)


def load_whole(before: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Into whole parameters, of which each rank keeps its part. Collective."""
    wrapped = _sharded(self)
    with nullcontext() if wrapped is None else gathered(wrapped, modify=True):
        return before(self, *args, **kwargs)


_METHODS: dict[str, Callable[..., Any]] = {
    "create_optimizer": create_optimizer,
    "create_scheduler": create_scheduler,
    "save_model": save_model,
    "_save": save,
    "_save_optimizer_and_scheduler": save_optimizer,
    "_load_best_model": load_whole,
    "_load_from_checkpoint": load_whole,
}


def _sharded(trainer: Any) -> ShardedModule | None:
    found = sharded(trainer.model)
    return found if isinstance(found, ShardedModule) else None

"""The sections "optimizer" and "scheduler" of DeepSpeed's configuration, as torch's objects."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from mpizero import ArgumentError

_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_KINDS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.AdamW, _ADAM),  # what DeepSpeed's Adam is, unless adam_w_mode is false
    "adamw": (torch.optim.AdamW, _ADAM),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0.0}),
    "sgd": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}),
}
# How DeepSpeed computes it.
_BESIDE = ("torch_adam", "fused", "fp32_optimizer_states", "set_grad_none", "bias_correction")


def build_optimizer(
    section: Mapping[str, Any], parameters: Sequence[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer that a section describes, with DeepSpeed's defaults."""
    name, params = str(section.get("type")), dict(section.get("params") or {})
    if name.lower() not in _KINDS:
        raise ArgumentError(
            "deepspeed", "optimizer.type", repr(section.get("type")), "Adam, AdamW, Adagrad, SGD",
            "Leave the section out, and give Trainer the optimizer: optimizers=(optimizer, None).",
        )  # fmt: skip
    build, defaults = _KINDS[name.lower()]
    if name.lower() == "adam" and params.pop("adam_w_mode", True) is False:
        build = torch.optim.Adam
    params.pop("adam_w_mode", None)
    if params.get("bias_correction", True) is not True:
        raise _unknown("optimizer", "bias_correction", params["bias_correction"])
    for key in _BESIDE:
        params.pop(key, None)
    if params.get("amsgrad") is False:
        del params["amsgrad"]
    for key in params:
        if key not in defaults:
            raise _unknown("optimizer", key, params[key])
    return build(parameters, **{**defaults, **params})


def build_schedule(section: Mapping[str, Any], optimizer: Any) -> LRScheduler:
    """The schedule that a section describes."""
    name, params = str(section.get("type")), dict(section.get("params") or {})
    kinds = {
        "WarmupLR": _warmed_up, "WarmupDecayLR": _then_down, "WarmupCosineLR": _then_cosine,
    }  # fmt: skip
    if name not in kinds:
        raise ArgumentError(
            "deepspeed", "scheduler.type", repr(section.get("type")), ", ".join(kinds),
            "Leave the section out, and say lr_scheduler_type=... in TrainingArguments.",
        )  # fmt: skip
    base = float(optimizer.param_groups[0]["lr"])
    rate = kinds[name](params, base)
    for key, value in params.items():
        raise _unknown("scheduler", key, value)
    plain = getattr(optimizer, "optimizer", optimizer)
    return Lagging(getattr(plain, "inner", plain), rate)


class Lagging(LRScheduler):
    """The rates of DeepSpeed's schedules: the first two steps have the first one."""

    def __init__(self, optimizer: torch.optim.Optimizer, rate: Callable[[int], float]) -> None:
        self.rate = rate
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """For the step that comes; a schedule of DeepSpeed's begins with its first ``step()``."""
        return [self.rate(self.last_epoch - 1)] * len(self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Without the function, which cannot be stored."""
        return {key: value for key, value in super().state_dict().items() if key != "rate"}


def _rising(params: dict[str, Any]) -> tuple[int, Callable[[int], float]]:
    """Until which step rates rise, and what part of the way they have come there."""
    steps = max(2, int(params.pop("warmup_num_steps", 1000)))
    if params.pop("warmup_type", "log") == "linear":
        return steps, lambda at: max(0, at) / steps
    return steps, lambda at: math.log(max(0, at) + 1) / math.log(steps)


def _warmed_up(params: dict[str, Any], base: float) -> Callable[[int], float]:
    lowest, highest = params.pop("warmup_min_lr", 0.0), params.pop("warmup_max_lr", base)
    steps, part = _rising(params)
    return lambda at: lowest + (highest - lowest) * (part(at) if at < steps else 1.0)


def _then_down(params: dict[str, Any], base: float) -> Callable[[int], float]:
    lowest, highest = params.pop("warmup_min_lr", 0.0), params.pop("warmup_max_lr", 1e-3)
    total = _total(params)
    steps, part = _rising(params)

    def rate(at: int) -> float:
        down = max(0.0, (total - at) / max(1.0, total - steps))
        return float(lowest + (highest - lowest) * (part(at) if at < steps else down))

    return rate


def _then_cosine(params: dict[str, Any], base: float) -> Callable[[int], float]:
    lowest, floor = params.pop("warmup_min_ratio", 0.0), params.pop("cos_min_ratio", 1e-4)
    total = _total(params)
    steps, part = _rising(params)

    def rate(at: int) -> float:
        if at < 0:
            return 0.0
        if at < steps:
            return float(base * (lowest + (1 - lowest) * part(at)))
        gone = min(1.0, (at - steps + 1) / max(1, total - steps))
        return float(base * (floor + (1 - floor) * (1 + math.cos(math.pi * gone)) / 2))

    return rate


def _total(params: dict[str, Any]) -> int:
    if not isinstance(params.get("total_num_steps"), int):
        raise _unknown("scheduler", "total_num_steps", params.get("total_num_steps"))
    return int(params.pop("total_num_steps"))


def _unknown(section: str, key: str, value: Any) -> ArgumentError:
    return ArgumentError(
        "deepspeed", f"{section}.params.{key}", repr(value), "nothing, or what the type has",
        f"Leave the section '{section}' out, and say it in TrainingArguments.",
    )  # fmt: skip

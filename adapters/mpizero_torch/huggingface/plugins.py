"""What Accelerate's plugins for DeepSpeed and FSDP ask for, as settings of ``mz.zero``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mpizero import ArgumentError, World
from mpizero_torch.huggingface.deepspeed_config import Settings, read
from mpizero_torch.sharding.precision import MixedPrecision

# Accelerate's own, for what is "auto" and is not said elsewhere.
_CLIPPING = 1.0

# FSDP's strategies, of its first version; the second has True and False.
_STRATEGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "TRUE": (3, {}),
    "FALSE": (2, {}),
    "FULL_SHARD": (3, {}),
    "SHARD_GRAD_OP": (2, {}),
    "NO_SHARD": (0, {}),
    "HYBRID_SHARD": (3, {"shard_group": "node"}),
    "HYBRID_SHARD_ZERO2": (2, {"shard_group": "node"}),
}


def settings_of(given: Mapping[str, Any], world: World) -> Settings | None:
    """What an Accelerator's arguments, or ``accelerate launch``'s variables, ask for; or None."""
    from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin

    deepspeed = given.get("deepspeed_plugin") or given.get("deepspeed_plugins")
    fsdp = given.get("fsdp_plugin")
    if deepspeed is None and _is_set("ACCELERATE_USE_DEEPSPEED"):
        deepspeed = DeepSpeedPlugin()
    if fsdp is None and _is_set("ACCELERATE_USE_FSDP"):
        fsdp = FullyShardedDataParallelPlugin()
    precision = str(
        given.get("mixed_precision") or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    )
    if isinstance(deepspeed, dict):
        raise ArgumentError(
            "Accelerator()", "deepspeed_plugin", f"a dict of {len(deepspeed)} plugins", "one plugin"
        )
    if deepspeed is not None:
        steps = given.get("gradient_accumulation_steps", 1)
        return _of_deepspeed(deepspeed, precision, steps, world)
    return None if fsdp is None else _of_fsdp(fsdp, precision)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def _of_deepspeed(plugin: Any, precision: str, steps: int, world: World) -> Settings:
    made = getattr(plugin, "mpizero_settings", None)
    if made is not None:
        found: Settings = made
        return found
    config = plugin.hf_ds_config.config
    for name in ("bf16", "fp16"):
        # As Accelerate does where the configuration does not say.
        if precision == name and not {"bf16", "fp16"} & config.keys():
            config = {**config, name: {"enabled": True}}
    auto = {"bf16.enabled": precision == "bf16", "fp16.enabled": precision == "fp16"}
    known: dict[str, Any] = {
        key: value for key, value in auto.items() if precision != "no" or _is_auto(config, key)
    }
    if config.get("gradient_clipping") == "auto":
        known["gradient_clipping"] = _CLIPPING
    if config.get("gradient_accumulation_steps") == "auto":
        known["gradient_accumulation_steps"] = steps
    settings = read({k: v for k, v in config.items() if k != "steps_per_print"}, known, world.size)
    for name in ("optimizer", "scheduler"):
        if getattr(settings, name) is not None:
            raise ArgumentError(
                "Accelerator()", "deepspeed_plugin", f"one with a section '{name}'", "none",
                f"Build torch's own {name} in place of the dummy, and give it to prepare().",
            )  # fmt: skip
    return settings


def _is_auto(config: Mapping[str, Any], key: str) -> bool:
    section, name = key.split(".")
    return isinstance(config.get(section), dict) and config[section].get(name) == "auto"


def _of_fsdp(plugin: Any, precision: str) -> Settings:
    strategy = getattr(plugin, "sharding_strategy", None) or plugin.reshard_after_forward
    name = str(getattr(strategy, "name", strategy)).upper().lstrip("_")
    if name not in _STRATEGIES:
        raise ArgumentError(
            "FSDP", "reshard_after_forward", repr(strategy), ", ".join(_STRATEGIES).lower()
        )
    stage, options = _STRATEGIES[name]
    options = dict(options)
    for given, remedy in (
        ("ignored_modules", "Parameters that are in no group of the optimizer are not trained."),
        ("activation_checkpointing", "Call model.gradient_checkpointing_enable()."),
        ("mixed_precision_policy", "Say mixed_precision='bf16' to the Accelerator."),
    ):
        value = getattr(plugin, given, None)
        if value:
            raise ArgumentError("FSDP", given, repr(value)[:80], "nothing", remedy)
    offload = plugin.cpu_offload
    if getattr(offload, "offload_params", type(offload).__name__ == "CPUOffloadPolicy"):
        options["offload"] = "cpu"
    if precision in ("bf16", "fp16"):
        if stage == 0:
            raise ArgumentError(
                "FSDP", "reshard_after_forward", name.lower(), "a strategy that shards, in 16 bits"
            )
        options["precision"] = MixedPrecision(precision)
    return Settings(stage, precision if precision in ("bf16", "fp16") else "no", options)

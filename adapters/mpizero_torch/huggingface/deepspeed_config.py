"""What a configuration of DeepSpeed's asks for, as arguments of ``mz.zero``.

Each key is taken, has no effect on what is learnt here and is passed over, or is refused with what
to write instead; so is one that is not known.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpizero import ArgumentError
from mpizero_torch.huggingface.keys import BESIDE, ONE_IS_OFF, REFUSED
from mpizero_torch.sharding.precision import MixedPrecision

AUTO = "auto"
_OFF = (None, False, 0, "", "none", AUTO)


@dataclass(frozen=True)
class Settings:
    """How a model is to be trained. ``precision``: "fp16", "bf16", or "no".

    ``options``: of ``mz.zero``. ``clipping``: the norm to which gradients are limited at every
    step, by nobody else. ``optimizer``, ``scheduler``: sections (type, params), or None.
    """

    stage: int
    precision: str = "no"
    options: Mapping[str, Any] = field(default_factory=dict)
    clipping: float | None = None
    accumulation: int | None = None
    optimizer: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None


def load(config: Any) -> dict[str, Any]:
    """The configuration as a dict of its own: of a dict, or of a JSON file's path."""
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    try:
        found: dict[str, Any] = json.loads(Path(config).read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError) as error:
        raise ArgumentError(
            "deepspeed", "config", repr(config), "a dict, or the path of a JSON file", f"({error})"
        ) from error
    return found


def read(
    config: Any, auto: Mapping[str, Any], ranks: int, free: Mapping[str, Any] | None = None
) -> Settings:
    """What it asks for. ``auto``: the values of keys that are "auto", by their long names.

    A key that is in ``auto`` and says something else is an ArgumentError, as is what cannot be
    done; those in ``free`` may.
    """
    given = _Given(load(config), auto, free or {})
    stage = given.take("zero_optimization.stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise _wrong("zero_optimization.stage", stage, "0, 1, 2 or 3")
    precision, policy = _precision(given)
    options: dict[str, Any] = {} if policy is None else {"precision": policy}
    if stage == 0 and policy is not None:
        raise _wrong(
            "zero_optimization.stage", 0, f"1, 2 or 3 with {precision}.enabled",
            "Replicas train in 16 bits by autocast: leave DeepSpeed's configuration out then.",
        )  # fmt: skip
    kept = given.take("data_types.grad_accum_dtype", None)
    if kept not in (None, "fp32", precision):
        raise _wrong("data_types.grad_accum_dtype", kept, f"'fp32', {precision!r}")
    if kept == "fp32" and policy is not None:
        options["accumulate_in_float32"] = True
    options |= _where(given, stage)
    options |= given.section("mpizero")
    settings = Settings(
        stage,
        precision,
        options,
        given.take("gradient_clipping", None) or None,
        given.take("gradient_accumulation_steps", None),
        given.section("optimizer") or None,
        given.section("scheduler") or None,
    )
    _check_batch(given, settings.accumulation or 1, ranks)
    given.refuse_the_rest()
    return settings


class _Given:
    """A configuration of which keys are taken one by one, by their long names."""

    def __init__(
        self, config: dict[str, Any], auto: Mapping[str, Any], free: Mapping[str, Any]
    ) -> None:
        self._config, self._auto, self._free = config, auto, free

    def take(self, key: str, default: Any) -> Any:
        """Its value; where that is "auto", what it stands for."""
        *sections, last = key.split(".")
        place: Any = self._config
        for section in sections:
            place = place.get(section)
            if not isinstance(place, dict):
                return default
        if last not in place:
            return default
        value = place.pop(last)
        if value == AUTO:
            return self._auto.get(key, self._free.get(key, default))
        if key in self._auto and value != self._auto[key] and value is not None:
            raise _wrong(
                key, value, f"{self._auto[key]!r}, as the program says itself",
                'Write "auto" there, or say the same in both places.',
            )  # fmt: skip
        return value

    def section(self, name: str) -> dict[str, Any]:
        """All of a section."""
        section = self._config.get(name)
        if not isinstance(section, dict):
            return {}
        found: dict[str, Any] = {}
        for key in list(section):
            if isinstance(section[key], dict):
                found[key] = {k: self.take(f"{name}.{key}.{k}", None) for k in list(section[key])}
                del section[key]
            else:
                found[key] = self.take(f"{name}.{key}", None)
        del self._config[name]
        return found

    def refuse_the_rest(self) -> None:
        """Raise ArgumentError for what would have an effect with DeepSpeed, and has none here."""
        for key, value in _leaves(self._config, ""):
            if key in BESIDE or any(key.startswith(f"{each}.") for each in BESIDE):
                continue
            for refused, remedy in REFUSED.items():
                if key == refused or key.startswith(f"{refused}."):
                    section = self._config.get(refused.split(".")[0])
                    if value in _OFF or _is_off(section) or (value == 1 and key in ONE_IS_OFF):
                        break
                    raise _wrong(key, value, "nothing", remedy)
            else:
                raise _wrong(key, value, "nothing", "This key is not known here: leave it out.")


def _is_off(section: Any) -> bool:
    return isinstance(section, dict) and section.get("enabled", True) in _OFF


def _leaves(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _precision(given: _Given) -> tuple[str, MixedPrecision | None]:
    bf16 = given.take("bf16.enabled", False)
    fp16 = given.take("fp16.enabled", False)
    constant = given.take("fp16.loss_scale", 0)
    scale: dict[str, Any] = {
        "initial_scale": 2.0 ** given.take("fp16.initial_scale_power", 16),
        "growth_interval": given.take("fp16.loss_scale_window", 1000),
        "smallest_scale": float(given.take("fp16.min_loss_scale", 1) or 1),
    }
    if bf16 and fp16:
        raise _wrong("fp16.enabled", True, "one of fp16 and bf16")
    if bf16:
        return "bf16", MixedPrecision("bf16")
    if not fp16:
        return "no", None
    if constant:
        scale["loss_scale"] = float(constant)
    return "fp16", MixedPrecision("fp16", **scale)


def _where(given: _Given, stage: int) -> dict[str, Any]:
    """Where state is kept: offloading, and among which ranks."""
    options: dict[str, Any] = {}
    device = given.take("zero_optimization.offload_optimizer.device", None)
    path = given.take("zero_optimization.offload_optimizer.nvme_path", None)
    if device not in (*_OFF, "cpu", "nvme"):
        raise _wrong("zero_optimization.offload_optimizer.device", device, "none, cpu, nvme")
    if device == "cpu":
        options["offload"] = "cpu"
    elif device == "nvme":
        options |= {"offload": "disk", "offload_dir": path}
    for key in ("zero_hpz_partition_size", "mics_shard_size"):
        size = given.take(f"zero_optimization.{key}", None)
        if size not in (*_OFF, 1, -1):
            options["shard_group"] = size
    if "offload" in options and stage == 0:
        raise _wrong("zero_optimization.stage", 0, "1, 2 or 3 with offload_optimizer")
    return options


def _check_batch(given: _Given, accumulation: int, ranks: int) -> None:
    """``train_batch_size`` is that of all ranks, and of all micro-batches of a step."""
    total = given.take("train_batch_size", None)
    micro = given.take("train_micro_batch_size_per_gpu", None)
    if total is None or micro is None:
        return
    if total != micro * accumulation * ranks:
        raise _wrong(
            "train_batch_size", total,
            f"{micro * accumulation * ranks}: train_micro_batch_size_per_gpu ({micro}) times "
            f"gradient_accumulation_steps ({accumulation}) times {ranks} ranks",
        )  # fmt: skip


def _wrong(key: str, value: Any, allowed: str, remedy: str = "") -> ArgumentError:
    return ArgumentError("deepspeed", key, repr(value), allowed, remedy)

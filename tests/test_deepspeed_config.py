"""DeepSpeed's configuration, key by key: taken, without effect, or refused with a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpizero import ArgumentError
from mpizero_torch.huggingface.deepspeed_config import Settings, read
from mpizero_torch.huggingface.sections import build_optimizer, build_schedule

pytestmark = pytest.mark.once

ZERO2: dict[str, Any] = {"zero_optimization": {"stage": 2}}


def settings(config: Any, auto: dict[str, Any] | None = None, ranks: int = 2) -> Settings:
    return read(config, auto or {}, ranks)


def test_a_configuration_as_users_have_it_is_taken_from_a_file(tmp_path: Path) -> None:
    config = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False, "loss_scale": 0, "hysteresis": 2, "min_loss_scale": 1},
        "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/scratch"},
            "offload_param": {"device": "none", "pin_memory": True}, "overlap_comm": True,
            "contiguous_gradients": True, "reduce_bucket_size": "auto", "sub_group_size": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True, "zero_hpz_partition_size": 2,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_accumulation_steps": 4, "gradient_clipping": 0.5, "steps_per_print": 10,
        "train_micro_batch_size_per_gpu": 3, "train_batch_size": 24,
        "zero_allow_untested_optimizer": True, "wall_clock_breakdown": False,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.1}},
        "mpizero": {"segment_mb": 1},
    }  # fmt: skip
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    found = settings(str(file), {"bf16.enabled": True, "optimizer.params.lr": 0.25})
    assert (found.stage, found.precision, found.clipping, found.accumulation) == (3, "bf16", 0.5, 4)
    options = dict(found.options)
    assert options.pop("precision").dtype == "bf16"
    assert options == {
        "offload": "disk", "offload_dir": "/scratch", "shard_group": 2, "segment_mb": 1,
        "accumulate_in_float32": True,
    }  # fmt: skip
    assert found.optimizer == {"type": "AdamW", "params": {"lr": 0.25, "weight_decay": 0.1}}


def test_the_loss_scale_is_the_configurations() -> None:
    scale = {"initial_scale_power": 10, "loss_scale_window": 50, "min_loss_scale": 4}
    found = settings(ZERO2 | {"fp16": {"enabled": True, **scale}}).options["precision"]
    given = (found.initial_scale, found.growth_interval, found.smallest_scale, found.loss_scale)
    assert given == (1024.0, 50, 4.0, None)
    found = settings(ZERO2 | {"fp16": {"enabled": True, "loss_scale": 128}}).options["precision"]
    assert found.loss_scale == 128.0
    found = settings(ZERO2 | {"fp16": {"enabled": True}}).options["precision"]
    assert (found.initial_scale, found.growth_interval) == (65536.0, 1000)  # DeepSpeed's defaults


REFUSED = {
    "zero_optimization.offload_param.device": ("cpu", "stage 3 on more ranks"),
    "zero_optimization.zero_quantized_gradients": (True, "not compressed"),
    "zero_optimization.stage": (4, "0, 1, 2 or 3"),
    "zero_optimization.overlap_com": (True, "not known here"),
    "sparse_gradients": (True, "dense gradients"),
    "prescale_gradients": (True, "averaged"),
    "gradient_predivide_factor": (2.0, "averaged"),
    "communication_data_type": ("fp16", "in the dtype"),
    "amp.enabled": (True, "bf16.enabled"),
    "tensor_parallel.autotp_size": (2, "mz.mesh"),
    "tensorboard.enabled": (True, "report_to"),
    "curriculum_learning.enabled": (True, "data loader"),
    "compression_training.weight_quantization.shared_parameters.enabled": (True, "compressed"),
    "data_types.grad_accum_dtype": ("bf16", "'fp32'"),
    "train_micro_batch_size": (3, "not known here"),
    "bf16.enable": (True, "not known here"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(key: str) -> None:
    value, remedy = REFUSED[key]
    config: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    *sections, last = key.split(".")
    place = config
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    with pytest.raises(ArgumentError, match=remedy) as error:
        settings(config)
    assert f"'{key}' is {value!r}" in str(error.value)


@pytest.mark.parametrize(
    "off",
    [
        {"tensorboard": {"enabled": False, "output_path": "x"}},
        {"sparse_gradients": False, "communication_data_type": None, "amp": {"enabled": False}},
        {"gradient_predivide_factor": 1.0, "prescale_gradients": False},
        {"activation_checkpointing": {"partition_activations": False}, "aio": {"thread_count": 1}},
        {"flops_profiler": {"enabled": False, "profile_step": 1}},
    ],
)
def test_what_is_off_is_passed_over(off: dict[str, Any]) -> None:
    assert settings(ZERO2 | off) == Settings(2)


def test_the_batch_is_that_of_all_ranks() -> None:
    batch = {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}
    settings(ZERO2 | batch | {"train_batch_size": 12})
    with pytest.raises(ArgumentError, match=r"'train_batch_size' is 6; allowed: 12: .* 2 ranks"):
        settings(ZERO2 | batch | {"train_batch_size": 6})


def test_what_the_program_says_otherwise_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"'gradient_clipping' is 0.5; allowed: 1.0"):
        settings(ZERO2 | {"gradient_clipping": 0.5}, {"gradient_clipping": 1.0})
    assert settings(ZERO2, {"gradient_clipping": 1.0}).clipping is None


def test_replicas_have_no_16_bits() -> None:
    with pytest.raises(ArgumentError, match="autocast"):
        settings({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}})


def test_optimizers_have_deepspeeds_defaults() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2))]
    adam = build_optimizer({"type": "Adam", "params": {"lr": 0.5}}, parameters)
    assert type(adam) is torch.optim.AdamW
    assert adam.defaults["weight_decay"] == 0.0 and adam.defaults["lr"] == 0.5
    plain = {"type": "Adam", "params": {"adam_w_mode": False, "torch_adam": True}}
    assert type(build_optimizer(plain, parameters)) is torch.optim.Adam
    for section in ({"type": "Lamb"}, {"type": "AdamW", "params": {"max_coeff": 1}}):
        with pytest.raises(ArgumentError, match="Leave the section"):
            build_optimizer(section, parameters)


@pytest.mark.parametrize(
    ("section", "rates"),
    [
        # Two steps with the lowest rate, then log(2)/log(4), log(3)/log(4), 1.
        ({"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 8.0}},
         [0, 0, 4.0, 6.33985, 8.0, 8.0]),
        ({"type": "WarmupDecayLR",
          "params": {"warmup_num_steps": 2, "warmup_max_lr": 8.0, "warmup_type": "linear",
                     "warmup_min_lr": 2.0, "total_num_steps": 4}},
         [2.0, 2.0, 5.0, 8.0, 5.0, 2.0, 2.0]),
        ({"type": "WarmupCosineLR",
          "params": {"warmup_num_steps": 2, "warmup_type": "linear", "cos_min_ratio": 0.0,
                     "total_num_steps": 4}},
         [0.0, 0.0, 0.5, 0.5, 0.0, 0.0]),
    ],
)  # fmt: skip
def test_schedules_are_deepspeeds(section: dict[str, Any], rates: list[float]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    schedule = build_schedule(section, optimizer)
    found = []
    for _ in rates:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(rates, abs=1e-5)
    schedule.load_state_dict(json.loads(json.dumps(schedule.state_dict())))

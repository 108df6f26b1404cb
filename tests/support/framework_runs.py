"""Programs of Accelerate's, Trainer's and Lightning's users, for ``tests/test_framework_sharding``.

    python -m support.framework_runs FOLDER GROUP...

Every rank runs them; rank 0 writes what has been learnt to FOLDER/RANKS.json. The whole batch is
the same for any number of ranks that divides it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

BATCH, SAMPLES, STEPS = 12, 36, 6  # of all ranks together
Result = dict[str, Any]


class Samples(Dataset[dict[str, torch.Tensor]]):
    """Numbers that a small network can learn something of."""

    def __init__(self, count: int = SAMPLES) -> None:
        drawn = torch.Generator().manual_seed(5)
        self.x = torch.randn(count, 8, generator=drawn)
        self.y = (self.x[:, :1] * 2 - self.x[:, 1:2]).tanh()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.y[index]}


class Net(nn.Module):
    """With a loss, as Trainer wants it; made the same on every rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(24)
        self.last = nn.Linear(24, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        found = self.last(torch.tanh(self.norm(self.first(x))))
        if labels is None:
            return found
        return {"loss": nn.functional.mse_loss(found.float(), labels.float()), "logits": found}


def weights(state: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {name: value.float().reshape(-1).tolist() for name, value in state.items()}


def world() -> Any:
    import mpizero_torch as mz

    return mz.init()


def trainer(folder: Path, changes: dict[str, Any], **more: Any) -> tuple[Any, list[float]]:
    """A Trainer, and the losses that it logs."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    micro = BATCH // world().size // changes.get("gradient_accumulation_steps", 1)
    losses: list[float] = []

    class Note(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            losses.extend(
                logs[key] for key in ("loss", "grad_norm", "learning_rate") if key in logs
            )

    arguments = {
        "max_steps": STEPS, "learning_rate": 0.05, "max_grad_norm": 0.5, "logging_steps": 1,
        "per_device_train_batch_size": micro, "per_device_eval_batch_size": micro,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "optim": "sgd",
        "lr_scheduler_type": "linear", "remove_unused_columns": False,
        "use_cpu": True, "dataloader_pin_memory": False, "logging_nan_inf_filter": False,
    } | changes  # fmt: skip
    made = Trainer(
        Net(), TrainingArguments(str(folder), **arguments), train_dataset=Samples(),
        eval_dataset=Samples(12), callbacks=[Note()], **more,
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    return made, losses


def saved(folder: Path) -> dict[str, list[float]]:
    from safetensors.torch import load_file

    world().barrier()
    return weights(load_file(folder / "model.safetensors"))


def trainer_run(changes: dict[str, Any]) -> Callable[[Path], Result]:
    """Train, evaluate, save."""

    def run(folder: Path) -> Result:
        made, losses = trainer(folder, changes)
        made.train()
        evaluated = made.evaluate()["eval_loss"]
        made.save_model(str(folder / "whole"))
        return {"losses": losses, "evaluated": evaluated, "weights": saved(folder / "whole")}

    return run


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """A configuration of the kind that users have."""
    return {
        "zero_optimization": {"stage": stage, "overlap_comm": True, "reduce_bucket_size": "auto"},
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "initial_scale_power": 8},
        "steps_per_print": 2000, "wall_clock_breakdown": False,
    } | more  # fmt: skip


SECTIONS = {
    "optimizer": {
        "type": "Adam",
        "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto"},
    },
}
_PRIVATE = zero(3, mpizero={"share_parameters": False, "segment_mb": 0.001})


def resumed(folder: Path) -> Result:
    """Go on from what one process has left after three steps, to the end."""
    changes: dict[str, Any] = {
        "deepspeed": zero(2, **SECTIONS), "learning_rate": 0.01, "weight_decay": 0.1,
        "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    made, losses = trainer(folder, changes)
    if world().size == 1:
        made.train()
        (folder / "model.safetensors").hardlink_to(folder / f"checkpoint-{STEPS}/model.safetensors")
        return {"losses": losses[-3 * 3 :], "weights": saved(folder)}
    made.train(resume_from_checkpoint=str(folder.parents[1] / "1" / folder.name / "checkpoint-3"))
    made.save_model()
    return {"losses": losses, "weights": saved(folder)}


def best(folder: Path) -> Result:
    """The first steps are the best: the rate is far too large. And train once more from there."""
    changes = {
        "deepspeed": _PRIVATE | {"zero_optimization": {"stage": 3}}, "learning_rate": 0.8,
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "max_grad_norm": 100.0, "lr_scheduler_type": "constant",
    }  # fmt: skip
    made, losses = trainer(folder, changes)
    made.train()
    where = made.state.best_model_checkpoint.rsplit("-", 1)[-1]
    evaluated = [made.state.best_metric, made.evaluate()["eval_loss"]]
    made.args.learning_rate, made.args.max_steps = 0.01, 3
    made.args.load_best_model_at_end = False
    made.train()
    made.save_model(str(folder / "whole"))
    return {
        "best": where, "evaluated": evaluated, "losses": losses, "weights": saved(folder / "whole"),
    }  # fmt: skip


def fsdp(folder: Path) -> Result:
    """Trainer has it for several ranks only."""
    changes = {} if world().size == 1 else {"fsdp": True, "fsdp_config": {"version": 2}}
    return trainer_run(changes)(folder)


def accelerate_run(make: Callable[[], dict[str, Any]]) -> Callable[[Path], Result]:
    """A loop that accumulates, clips, schedules, saves in the middle, and goes on from there."""

    def run(folder: Path) -> Result:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DataLoaderConfiguration

        AcceleratorState._reset_state(reset_partial_state=False)
        accelerator = Accelerator(
            gradient_accumulation_steps=2, step_scheduler_with_optimizer=False,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True), **make(),
        )  # fmt: skip
        model, losses = Net(), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        micro = BATCH // world().size // 2
        loader: Any = torch.utils.data.DataLoader(Samples(), batch_size=micro)
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        for epoch in range(2):
            for batch in loader:
                with accelerator.accumulate(model):
                    found = model(**batch)
                    accelerator.backward(found["loss"])
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(model.parameters(), 0.7)
                        losses.append(float(norm))
                    optimizer.step()
                    optimizer.zero_grad()
                each = accelerator.gather_for_metrics(found["loss"].detach())
                losses.append(float(each.mean()))
            schedule.step()
            if epoch == 0:
                accelerator.save_state(str(folder / "state"))
        final = accelerator.get_state_dict(model)
        first = weights(final) if accelerator.is_main_process else {}
        plain = accelerator.unwrap_model(model)
        assert type(plain) is Net, type(plain)
        elsewhere = folder.parents[1] / "1" / folder.name / "state"  # of one process
        accelerator.load_state(str(elsewhere))
        rate = optimizer.param_groups[0]["lr"]
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.7)
                optimizer.step()
                optimizer.zero_grad()
        again = accelerator.get_state_dict(model)
        return {
            "losses": losses, "weights": first, "rate": rate,
            "again": weights(again) if accelerator.is_main_process else {},
        }  # fmt: skip

    return run


def lightning_run(strategy: str, manual: bool = False, **options: Any) -> Callable[[Path], Result]:
    """Fit with clipping and accumulation, validate, save; go on from a checkpoint; test it."""

    def run(folder: Path) -> Result:
        import pytorch_lightning as pl

        import mpizero_torch as mz
        from mpizero_torch.lightning import ZeroStrategy

        class Module(pl.LightningModule):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.net = Net()
                self.automatic_optimization = not manual
                self.seen: list[float] = []

            def forward(self, **batch: Any) -> Any:
                return self.net(**batch)

            def training_step(self, batch: Any, index: int) -> Any:
                if not manual:
                    loss = self(**batch)["loss"]
                    self.log("loss", loss, sync_dist=True)
                    return loss
                found = []
                for at, optimizer in enumerate(self.optimizers()):
                    for each in self.optimizers():
                        each.zero_grad()
                    loss = self(**batch)["loss"] * (at + 1)
                    self.manual_backward(loss)
                    optimizer.step()
                    found.append(loss.detach())
                self.log("loss", sum(found), sync_dist=True)
                return None

            def on_train_batch_end(self, *_: Any) -> None:
                self.seen.append(float(self.trainer.callback_metrics["loss"]))

            def validation_step(self, batch: Any, index: int) -> None:
                self.log("held_out", self(**batch)["loss"], sync_dist=True)

            test_step = validation_step

            def configure_optimizers(self) -> Any:
                if manual:
                    first = torch.optim.SGD(self.net.first.parameters(), lr=0.05)
                    rest = [*self.net.norm.parameters(), *self.net.last.parameters()]
                    return [first, torch.optim.Adam(rest, lr=0.01)]
                optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
                return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]

        def trainer(epochs: int) -> Any:
            if "scale" in options:  # with which nothing overflows, on any number of ranks
                scale = options.pop("scale")
                options["precision"] = mz.MixedPrecision("fp16", initial_scale=scale)
            chosen = ZeroStrategy(**options) if strategy == "zero" else strategy
            clips = {} if manual else {"gradient_clip_val": 0.5, "accumulate_grad_batches": 3}
            return pl.Trainer(
                strategy=chosen, max_epochs=epochs, logger=False, enable_progress_bar=False,
                enable_checkpointing=False, enable_model_summary=False, accelerator="cpu",
                num_sanity_val_steps=0, **clips,
            )  # fmt: skip

        def loader(count: int) -> Any:
            return torch.utils.data.DataLoader(Samples(count), batch_size=BATCH // world().size)

        first, module = trainer(1), Module()
        first.fit(module, loader(SAMPLES), loader(12))
        held_out = [float(first.callback_metrics["held_out"])]
        first.save_checkpoint(str(folder / "one.ckpt"))
        alone = folder.parents[1] / "1" / folder.name / "one.ckpt"  # of one process
        again, other = trainer(2), Module()
        again.fit(other, loader(SAMPLES), ckpt_path=str(alone))
        again.save_checkpoint(str(folder / "two.ckpt"))
        held_out += [each["held_out"] for each in again.test(other, loader(12), verbose=False)]
        again.test(other, loader(12), ckpt_path=str(alone), verbose=False)
        held_out.append(float(again.callback_metrics["held_out"]))
        final = torch.load(folder / "two.ckpt", weights_only=False)["state_dict"]
        return {
            "losses": module.seen + other.seen, "weights": weights(final), "held_out": held_out,
        }  # fmt: skip

    return run


def deepspeed_plugin(stage: int, **more: Any) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        from accelerate import DeepSpeedPlugin

        return {
            "deepspeed_plugin": DeepSpeedPlugin(
                zero_stage=stage, gradient_clipping=0.7, gradient_accumulation_steps=2
            )
        } | more

    return make


def fsdp_plugin() -> dict[str, Any]:
    from accelerate import FullyShardedDataParallelPlugin

    return {"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2)}


def from_variables() -> dict[str, Any]:
    """What ``accelerate launch`` sets."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
    os.environ |= {"ACCELERATE_GRADIENT_CLIPPING": "0.7"}
    return {}


_STAGES = {f"stage {stage}": stage for stage in range(4)}
GROUPS: dict[str, dict[str, Callable[[Path], Result]]] = {
    "trainer": {
        "plain": trainer_run({}),
        **{name: trainer_run({"deepspeed": zero(stage)}) for name, stage in _STAGES.items()},
        "private": trainer_run({"deepspeed": _PRIVATE}),
        "accumulated": trainer_run({"deepspeed": zero(2), "gradient_accumulation_steps": 2}),
        "sections": trainer_run({"deepspeed": zero(3, **SECTIONS), "learning_rate": 0.01}),
        "bf16": trainer_run({"deepspeed": zero(2), "bf16": True}),
        "fp16": trainer_run({"deepspeed": zero(3), "fp16": True}),
        "fsdp": fsdp,
        "resumed": resumed,
        "best": best,
    },
    "accelerate": {
        "plain": accelerate_run(dict),
        "stage 0": accelerate_run(deepspeed_plugin(0)),
        "stage 2": accelerate_run(deepspeed_plugin(2)),
        "stage 3": accelerate_run(deepspeed_plugin(3)),
        "bf16": accelerate_run(deepspeed_plugin(2, mixed_precision="bf16")),
        "fsdp": accelerate_run(fsdp_plugin),
        "variables": accelerate_run(from_variables),
    },
    "lightning": {
        "plain": lightning_run("mpizero"),
        "stage 0": lightning_run("zero", stage=0),
        "stage 1": lightning_run("mpizero_stage_1"),
        "stage 2": lightning_run("zero", stage=2),
        "private": lightning_run("zero", stage=3, share_parameters=False, segment_mb=0.001),
        "bf16": lightning_run("zero", stage=3, precision="bf16"),
        "fp16": lightning_run("zero", stage=2, precision="fp16", scale=256.0),
        "manual": lightning_run("zero", manual=True, stage=3, share_parameters=False),
        "manual plain": lightning_run("mpizero", manual=True),
    },
}
# What is run on three ranks: one of each kind.
FEW = (
    "trainer private", "trainer sections", "trainer resumed", "trainer fsdp", "accelerate stage 2",
    "lightning private", "lightning manual",
)  # fmt: skip


def main() -> None:
    import mpizero_torch.huggingface

    folder, groups = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    ranks = mpizero_torch.huggingface.init()
    found: dict[str, Result] = {}
    for group in groups:
        for name, run in GROUPS[group].items():
            if ranks.size == 3 and f"{group} {name}" not in FEW:
                continue
            place = folder / str(ranks.size) / f"{group}-{name}".replace(" ", "-")
            try:
                found[f"{group} {name}"] = run(place)
            except Exception as error:
                traceback.print_exc()
                found[f"{group} {name}"] = {"error": f"{type(error).__name__}: {error}"}
    if ranks.rank == 0:
        (folder / f"{ranks.size}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

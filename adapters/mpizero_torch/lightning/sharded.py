"""``ZeroStrategy``: Lightning's training with ``mz.zero``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

from mpizero import ArgumentError, MpizeroError
from mpizero_torch.clip import clip_grad_norm_, clip_grad_value_
from mpizero_torch.lightning.replicas import _PACKAGE, MpiStrategy, _strategies
from mpizero_torch.process_group import TIMEOUT
from mpizero_torch.sharding.module import ShardedModule
from mpizero_torch.sharding.zero import zero
from mpizero_torch.wrapper import DistributedModule

_precision: Any = importlib.import_module(f"{_PACKAGE}.plugins.precision")
_states: Any = importlib.import_module(f"{_PACKAGE}.trainer.states")

# What has become of modules that were trained, also by trainers that are no more.
_SHARDED: WeakKeyDictionary[Any, DistributedModule] = WeakKeyDictionary()


class ZeroPrecision(_precision.Precision):  # type: ignore[misc]
    """Clips by the whole model's gradients. The precision itself is the sharded module's."""

    strategy: ZeroStrategy

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        """By the norm over all ranks' parts. Collective."""
        clip_grad_norm_(self._model("gradient_clip_val"), clip_val)

    def clip_grad_by_value(self, optimizer: Any, clip_val: float) -> None:
        """Each element, on the rank that has it."""
        clip_grad_value_(self._model("gradient_clip_val"), clip_val)

    def _model(self, argument: str) -> Any:
        if len(self.strategy.optimizers) > 1:
            raise ArgumentError(
                "clip_gradients()", argument, "given, with several optimizers", "one optimizer",
                "Gradients are clipped over the whole model: mpizero_torch.clip_grad_norm_("
                "self.trainer.strategy.sharded, ...), when all of them have been computed.",
            )  # fmt: skip
        return self.strategy.sharded


class ZeroStrategy(MpiStrategy):
    """The optimizer's state, gradients and parameters sharded over the ranks, by ``mz.zero``.

    ``stage`` and the other options are those of ``mz.zero``, ``precision`` ("bf16", "fp16") among
    them: leave the ``Trainer``'s out. Clipping (of all gradients), accumulation and checkpoints are
    Lightning's; these have whole parameters and states, and go on with any strategy, on any number
    of ranks. With manual optimization there may be several optimizers. Collective.
    """

    strategy_name = "mpizero_zero"

    def __init__(self, stage: int = 2, *, timeout: timedelta = TIMEOUT, **options: Any) -> None:
        self._stage, self._options = stage, options
        self.sharded: DistributedModule | None = None
        self._clips = ZeroPrecision()
        self._clips.strategy = self
        super().__init__(timeout=timeout, precision_plugin=self._clips)

    @property
    def precision_plugin(self) -> Any:
        """What clips, also where the strategy was given by its name."""
        return self._clips

    @precision_plugin.setter
    def precision_plugin(self, given: Any) -> None:
        if given is not None and type(given) not in (ZeroPrecision, _precision.Precision):
            raise ArgumentError(
                "Trainer()", "precision", f"one of a {type(given).__name__}", "nothing",
                "It is the strategy's: ZeroStrategy(stage=2, precision='bf16').",
            )  # fmt: skip

    def setup(self, trainer: Any) -> None:
        """Shard the module together with its optimizers, if it is to be trained. Collective."""
        self.sharded = _SHARDED.get(self.lightning_module)
        if trainer.state.fn != _states.TrainerFn.FITTING:
            if self.sharded is None:
                super().setup(trainer)
            else:
                self.accelerator.setup(trainer)
            return
        self.accelerator.setup(trainer)
        if self.sharded is not None:
            raise MpizeroError(
                "fit(): this module has been sharded by a fit() before, together with the "
                "optimizers of that. To train on, build it anew and give fit() a checkpoint "
                "(ckpt_path=...)."
            )
        self.model = self.precision_plugin.convert_module(self.lightning_module)
        self.model_to_device()
        self.setup_optimizers(trainer)
        plain: list[Any] = list(self._optimizers)
        if not plain:
            raise ArgumentError(
                "fit()", "configure_optimizers", "without an optimizer", "one or several of them"
            )
        self.sharded, made = zero(self.model, plain, self._stage, **self._options)
        self.optimizers = made
        self._let_go_through()
        self.model = self.sharded
        _SHARDED[self.lightning_module] = self.sharded
        self.lightning_module.toggle_optimizer = _no_toggling

    def _let_go_through(self) -> None:
        """Lightning's optimizers are copies of the sharded ones, by which these must act."""
        for each in self._lightning_optimizers:
            for name in ("zero_grad", "state_dict", "load_state_dict", "add_param_group"):
                setattr(each, name, getattr(each._optimizer, name))

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Through the sharded module; where the step runs backward itself, as it is."""
        if self.lightning_module.automatic_optimization:
            return super().training_step(*args, **kwargs)
        with self.precision_plugin.train_step_context():
            return self.lightning_module.training_step(*args, **kwargs)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Of whole parameters, as they are trained; on rank 0 alone. Collective."""
        if isinstance(self.sharded, ShardedModule):
            found: dict[str, Any] = self.sharded.state_dict(root=0)
            return found
        return dict(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The plain optimizer's; on rank 0 alone. Collective."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        root = {"root": 0} if hasattr(optimizer, "sharded_state") else {}
        return dict(optimizer.state_dict(**root))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Also into a module that is sharded. Collective."""
        sharded = _SHARDED.get(self.lightning_module)
        if sharded is None:
            super().load_model_state_dict(checkpoint, strict)
        else:
            sharded.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each rank keeps its part. Collective."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def teardown(self) -> None:
        """Leave a sharded module where it is."""
        if self.sharded is None:
            super().teardown()
            return
        self.model = self.lightning_module
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


def _no_toggling(*_: Any, **__: Any) -> None:
    raise MpizeroError(
        "toggle_optimizer(): an optimizer has shards here, not the module's parameters. Leave it "
        "out, and call zero_grad() of every optimizer before each manual_backward()."
    )


_strategies.StrategyRegistry.register(
    ZeroStrategy.strategy_name, ZeroStrategy, "ZeRO stage 2 over MPI", override=True
)
for _stage in (1, 2, 3):
    _strategies.StrategyRegistry.register(
        f"mpizero_stage_{_stage}",
        ZeroStrategy,
        f"ZeRO stage {_stage} over MPI",
        override=True,
        stage=_stage,
    )

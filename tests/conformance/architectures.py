"""Tiny models of the architectures in transformers, with random weights, and batches for them.

Which there are is the library's business: every model type that it has for a task is tried, with
small numbers for whatever its configuration calls by a usual name, and left out, with the reason,
if that makes no model that one process can train.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LENGTH, VOCABULARY, LABELS, IMAGE = 12, 96, 2, 32
_MOST_PARAMETERS = 4_000_000

# What configurations call their sizes. Those that one has are set.
_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32,
    "embedding_size": 32, "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2, "num_decoder_layers": 2, "num_attention_heads": 4,
    "n_head": 4, "num_heads": 4, "n_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8,
    "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "d_ff": 64, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "moe_intermediate_size": 32, "max_position_embeddings": 64,
    "n_positions": 64, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "n_routed_experts": 4, "image_size": IMAGE, "patch_size": 8,
    "type_vocab_size": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "sliding_window": 64, "use_cache": False,
    "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One kind of model: ``name`` as transformers has it, ``make()`` and ``batch(size, step)``."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int, int], dict[str, torch.Tensor]]


def architectures(
    wanted: Callable[[str], bool] = lambda name: True,
) -> Iterator[tuple[str, Architecture | None, str]]:
    """(name, the architecture or None, why it is left out), in the order of the names."""
    from transformers.models.auto import modeling_auto

    tasks: dict[str, tuple[Any, Callable[[int, int], dict[str, torch.Tensor]]]] = {
        "causal": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, _text),
        "masked": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, _text),
        "seq2seq": (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, _text),
        "image": (modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, _images),
    }
    for task, (names, batch) in tasks.items():
        for kind, class_name in sorted(names.items()):
            name = f"{task} {kind}"
            if not wanted(name):
                continue
            found, why = None, ""
            try:
                found = Architecture(name, _maker(kind, class_name), batch)
                _check(found)
            except Exception as error:
                found, why = None, f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            yield name, found, why


def _maker(kind: str, class_name: Any) -> Callable[[], nn.Module]:
    import transformers

    config_class: Any = transformers.AutoConfig.for_model(kind).__class__
    known = inspect.signature(config_class.__init__).parameters
    first = class_name[0] if isinstance(class_name, (tuple, list)) else class_name
    model_class = getattr(transformers, first)

    def make() -> nn.Module:
        named = set(known) | set(getattr(config_class, "attribute_map", {}))
        fields = getattr(config_class, "__dataclass_fields__", {})
        small = {key: value for key, value in _SMALL.items() if key in named or key in fields}
        torch.manual_seed(0)
        with _quietly():
            config = config_class(**small)
            for token in ("pad_token_id", "decoder_start_token_id"):
                if getattr(config, token, None) is None:
                    setattr(config, token, _SMALL[token])
            model: nn.Module = model_class(config)
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        return model.eval()  # nothing random: n ranks draw other numbers than one process

    return make


def _check(found: Architecture) -> None:
    """Raise for what one process cannot train."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in found.make().parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"it has {count:,} parameters")
    model = found.make()
    with _quietly():
        loss = model(**found.batch(2, 0)).loss
    loss.backward()
    if not torch.isfinite(loss):
        raise ValueError("its loss is not finite")


def _text(size: int, step: int) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(step)
    ids = torch.randint(3, VOCABULARY, (size, LENGTH), generator=drawn)
    return {"input_ids": ids, "labels": ids.clone()}


def _images(size: int, step: int) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(step)
    pixels = torch.randn(size, 3, IMAGE, IMAGE, generator=drawn)
    return {
        "pixel_values": pixels,
        "labels": torch.randint(0, LABELS, (size,), generator=drawn),
    }


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    import transformers

    logging: Any = transformers.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)

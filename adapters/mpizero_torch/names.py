"""Names of a model's tensors: the plain module's, whatever has wrapped it or its parts.

torch.compile puts ``_orig_mod.`` in front of the names of what it has compiled, and torch's
DistributedDataParallel ``module.``. Neither is the model's.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from typing import Any

from torch import nn

_COMPILED = "_orig_mod"
_WRAPPED = "module"

Rename = Callable[[str], str]


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that torch.compile was given, or the module itself."""
    # Nothing is compiled where torch._dynamo has not been imported, which takes seconds.
    frame = sys.modules.get("torch._dynamo.eval_frame")
    compiled = getattr(frame, "OptimizedModule", ())
    while isinstance(module, compiled):
        module = module._orig_mod
    return module


def plain(name: str) -> str:
    """A name as if nothing had been compiled."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's parameters by their plain names."""
    return ((plain(name), each) for name, each in module.named_parameters())


def named_buffers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's buffers by their plain names."""
    return ((plain(name), each) for name, each in module.named_buffers())


def state_dict(
    module: nn.Module,
    destination: MutableMapping[str, Any] | None = None,
    prefix: str = "",
    keep_vars: bool = False,
) -> Any:
    """A module's state_dict, by plain names."""
    own = uncompiled(module).state_dict(prefix=prefix, keep_vars=keep_vars)
    found = _renamed(own, lambda name: prefix[: len(name)] + plain(name[len(prefix) :]))
    if destination is None:
        return found
    destination.update(found)
    if hasattr(destination, "_metadata"):
        destination._metadata.update(found._metadata)
    return destination


def load_state_dict(module: nn.Module, given: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Load a state_dict of the plain module, or one with the prefixes of torch's wrappers."""
    module = uncompiled(module)
    if not isinstance(given, Mapping):
        return module.load_state_dict(given, *args, **kwargs)  # says what is wrong
    rename = renaming(module, given)
    result = module.load_state_dict(_renamed(given, rename), *args, **kwargs)
    for keys in (result.missing_keys, result.unexpected_keys):
        keys[:] = [plain(key) for key in keys]
    return result


def renaming(module: nn.Module, given: Collection[str]) -> Rename:
    """What makes of the names of a state_dict those that the module has itself.

    Names that all have ``module.`` in front are taken for another wrapper's if more of them are the
    module's own without it: a module may have a child of that name.
    """
    own = {plain(name): name for name in module.state_dict(keep_vars=True)}
    own |= {plain(path): path for path, _ in module.named_modules()}  # for versions of modules
    without = [name.partition(".")[2] for name in given if name.startswith(_WRAPPED + ".")]
    is_wrapped = len(without) == len(given) and _known(without, own) > _known(given, own)

    def rename(name: str) -> str:
        if is_wrapped and name.partition(".")[0] == _WRAPPED:
            name = name.partition(".")[2]
        return own.get(plain(name), plain(name))

    return rename


def _known(names: Collection[str], own: Collection[str]) -> int:
    return sum(plain(name) in own for name in names)


def _renamed(given: Mapping[str, Any], rename: Rename) -> Any:
    """A state_dict with other names, the versions of its modules too."""
    made: Any = OrderedDict((rename(name), value) for name, value in given.items())
    versions = getattr(given, "_metadata", None)
    if versions is not None:
        made._metadata = OrderedDict((rename(path), each) for path, each in versions.items())
    return made

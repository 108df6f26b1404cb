"""``save`` and ``load``: pytrees on disk and back, as safetensors that any number of ranks reads.

Each tree is a part with files of its own; an array in it is a tensor by the name of its place. What
``zero`` has spread over the ranks is written by the rank that keeps it, and read by the one that
will.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpizero import ArgumentError, World
from mpizero.adapting import (
    Checkpoint,
    Part,
    PendingSave,
    Piece,
    Save,
    TensorSpec,
    agreed,
    carry_out,
    shared_part,
    tree,
)
from mpizero_jax.ownership import EVERYWHERE
from mpizero_jax.runtime import ranks
from mpizero_jax.zero import Form, ZeroState

_PLAIN = "jax"  # under which, for each part, what is no array stands in the manifest

Rename = Mapping[str, str] | Callable[[str], str]


def save(
    path: str | os.PathLike[str],
    *,
    asynchronous: bool = False,
    world: World | None = None,
    **parts: Any,
) -> PendingSave | None:
    """Save pytrees of arrays and plain values, each by its keyword, in the folder ``path``.

        mj.save("run", params=params, state=state, step=step)

    Collective. A tree ``params`` becomes ``params.safetensors``, whose tensors are named by their
    places (``layers.0.kernel``). Trees must be the same on all ranks, but for a ``ZeroState`` (as a
    part, or within one), of which each rank writes its own. The folder is there wholly or not at
    all. ``asynchronous``: this rank's bytes are copied, and the result is to be waited for.

    Raises CheckpointError on every rank if one cannot write, and ArgumentError for leaves that
    could only be pickled.
    """
    of = ranks(world)
    with of.together("save()"):
        made, values = [], {}
        for name, given in parts.items():
            part, plain = _collected(name, given, of)
            made += [part] if part.specs else []
            values[name] = {_PLAIN: plain}
        job = Save(Path(path), of, made, values)
        return carry_out(job, of, asynchronous)


def load(
    path: str | os.PathLike[str],
    *,
    rename: Rename | None = None,
    strict: bool = True,
    world: World | None = None,
    **like: Any,
) -> dict[str, Any]:
    """What ``save`` was given, by keywords, in the form of trees that are ``like`` it.

        found = mj.load("run", params=params, state=optimizer.init(params), step=0)

    Collective, on any number of ranks: a ``ZeroState`` is this rank's part of it. What
    ``mpizero_torch`` has saved is read, too, where names and shapes are those of the tree
    (``model=...``). ``rename``: from a name in a tree to that in the files. With ``strict`` every
    tensor of a part must have a place in its tree.

    Raises CheckpointError where there is none, or a damaged one; ArgumentError, naming the tensor,
    for trees that do not fit it.
    """
    of = ranks(world)
    with Checkpoint(path, of) as checkpoint, agreed(of):
        return {
            part: _Reader(checkpoint, part, rename).read(given, strict, of.rank)
            for part, given in like.items()
        }


@dataclass(frozen=True)
class _Leaf:
    """A leaf of a tree, by its name; ``form`` and ``owner``: of an array that one rank keeps."""

    name: str
    value: Any
    form: Form | None = None
    owner: int = EVERYWHERE


def _leaves(name: str, given: Any) -> Iterator[_Leaf]:
    """The leaves of a part, in the order in which jax flattens it.

    ArgumentError for two of one name, as {"a.b": ...} and {"a": {"b": ...}} make them.
    """
    seen: set[str] = set()
    for leaf in _named(name, given):
        if leaf.name in seen:
            raise ArgumentError(
                f"{name}=", "tree", f"two leaves named '{leaf.name}'", "a name for each",
                "Names are the keys on the way to a leaf, with dots between them.",
            )  # fmt: skip
        seen.add(leaf.name)
        yield leaf


def _named(name: str, given: Any) -> Iterator[_Leaf]:
    for path, value in jax.tree_util.tree_flatten_with_path(given, is_leaf=_is_sharded)[0]:
        at = jax.tree_util.keystr(path, simple=True, separator=".")
        if not _is_sharded(value):
            yield _Leaf(at or name, value)
            continue
        inner = jax.tree_util.tree_flatten_with_path(value.inner)[0]
        for (place, leaf), form, owner in zip(inner, value.forms, value.owners, strict=True):
            within = jax.tree_util.keystr(place, simple=True, separator=".")
            yield _Leaf(".".join(filter(None, (at, within))) or name, leaf, form, owner)


def _is_sharded(value: Any) -> bool:
    return isinstance(value, ZeroState)


def _collected(name: str, given: Any, world: World) -> tuple[Part, dict[str, Any]]:
    """The arrays of a part, with those pieces that this rank writes, and what is no array."""
    shared: dict[str, Any] = {}
    specs: list[TensorSpec] = []
    pieces: list[Piece] = []
    plain: dict[str, Any] = {}
    for leaf in _leaves(name, given):
        if not _is_array(leaf.value):
            plain[leaf.name] = tree.encode(leaf.value, f"{name}.{leaf.name}", shared)
            continue
        array = np.asarray(_data(leaf.value))
        if leaf.owner == EVERYWHERE or leaf.form is None:
            shared[leaf.name] = array
            continue
        form = jax.eval_shape(_data, leaf.form.abstract)
        specs.append(TensorSpec(leaf.name, np.dtype(form.dtype), tuple(form.shape)))
        if leaf.owner == world.rank and array.size:
            pieces.append(Piece(leaf.name, 0, array.reshape(-1)))
    both = shared_part(name, shared, world)
    return Part(name, [*both.specs, *specs], [*both.pieces, *pieces]), plain


def _is_array(value: Any) -> bool:
    return isinstance(value, (jax.Array, np.ndarray, np.generic))


def _is_key(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def _data(value: Any) -> Any:
    """An array of numbers: of a random key, those that it consists of."""
    return jax.random.key_data(value) if _is_key(value.dtype) else value


@dataclass(frozen=True)
class _Reader:
    """One part of a checkpoint, for the trees that are like it."""

    checkpoint: Checkpoint
    part: str
    stored_names: Rename | None

    @property
    def plain(self) -> Mapping[str, Any]:
        """What is no array, by name."""
        values = self.checkpoint.values.get(self.part)
        found: Any = values.get(_PLAIN, {}) if isinstance(values, Mapping) else {}
        return found if isinstance(found, Mapping) else {}

    def read(self, like: Any, strict: bool, rank: int) -> Any:
        """The tree, of what was saved."""
        leaves = list(_leaves(self.part, like))
        specs = self.checkpoint.specs(self.part)
        names = [self._stored(leaf.name) for leaf in leaves]
        missing = [n for n in names if n not in specs and n not in self.plain]
        extra = sorted((specs.keys() | set(self.plain)).difference(names)) if strict else []
        if missing or extra:
            said = f"a tree with {missing[:8]}" if missing else f"a tree without {extra[:8]}"
            have = sorted({*specs, *self.plain})
            raise ArgumentError(
                "load()", self.part, said,
                f"the names in {self.checkpoint.path}: {have[:8]}{'...' if have[8:] else ''}",
                "rename= translates names; strict=False leaves out what has no place.",
            )  # fmt: skip
        found = [
            self._leaf(name, leaf, leaf.owner in (EVERYWHERE, rank))
            for name, leaf in zip(names, leaves, strict=True)
        ]
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), found)

    def _stored(self, name: str) -> str:
        known = self.stored_names
        if known is None:
            return name
        return known.get(name, name) if isinstance(known, Mapping) else known(name)

    def _leaf(self, name: str, leaf: _Leaf, is_own: bool) -> Any:
        if name in self.plain:
            return tree.decode(self.plain[name], lambda at: self.checkpoint.read(self.part, at))
        if not is_own:
            return leaf.value
        like = leaf.value if leaf.form is None else leaf.form.abstract
        if not hasattr(like, "dtype"):
            self._refuse(leaf.name, f"{like!r}", "an array")
        # Arrays of numpy's keep 64 bits, which jax may not have.
        is_jax = not isinstance(like, (np.ndarray, np.generic))
        form = jax.eval_shape(_data, like) if is_jax else like
        spec = self.checkpoint.spec(self.part, name)
        if (spec.shape, spec.dtype) != (tuple(form.shape), np.dtype(form.dtype)):
            self._refuse(
                leaf.name, f"{form.dtype}, shape {tuple(form.shape)}",
                f"{spec.dtype}, shape {spec.shape}",
            )  # fmt: skip
        array = self.checkpoint.read(self.part, name)
        if not is_jax:
            return array[()] if isinstance(like, np.generic) else array
        array = jnp.asarray(array)
        return _key_like(like, array) if _is_key(like.dtype) else array

    def _refuse(self, name: str, given: str, allowed: str) -> None:
        raise ArgumentError(
            "load()", self.part, f"'{name}' as {given}", f"{allowed}, as it was saved"
        )


def _key_like(like: Any, data: Any) -> Any:
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(like))

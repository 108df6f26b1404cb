"""A checkpoint whose parameters have other names, or some of them none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpizero import ArgumentError
from mpizero.checkpoint import Readable, TensorSpec
from mpizero_torch.checkpointing import model as models
from mpizero_torch.checkpointing import optimizer as optimizers
from mpizero_torch.checkpointing import own as owns

Rename = Callable[[str], "str | None"]


class Renamed:
    """What a checkpoint has, under the names that ``rename`` gives; without those it gives None."""

    def __init__(self, checkpoint: Readable, rename: Rename | Mapping[str, str | None]) -> None:
        self._inner, self.path = checkpoint, Path(checkpoint.path)
        if isinstance(rename, Mapping):
            table = dict(rename)
            self._rename: Rename = lambda name: table.get(name, name)
        else:
            self._rename = rename
        if checkpoint.values.get(owns.PART):
            raise ArgumentError(
                "load()", "rename", "given", "None for a checkpoint of what is each rank's own"
            )
        self._stored: dict[tuple[str, str], str] = {}
        self._specs: dict[str, dict[str, TensorSpec]] = {}
        self._aliases: dict[str, str] = {}
        self._rename_model()
        self._rename_optimizer()
        self._values = self._renamed_values()

    @property
    def values(self) -> dict[str, Any]:
        return self._values

    def specs(self, part: str) -> Mapping[str, TensorSpec]:
        return self._specs.get(part, self._inner.specs(part))

    def metadata(self, part: str) -> dict[str, str]:
        return self._aliases if part == models.PART else self._inner.metadata(part)

    def read(self, part: str, name: str, elements: slice | None = None) -> Any:
        return self._inner.read(part, self._stored.get((part, name), name), elements)

    def borrow(self, part: str, name: str, elements: slice) -> Any:
        return self._inner.borrow(part, self._stored.get((part, name), name), elements)

    def _rename_model(self) -> None:
        """A tensor is kept under the first of its names that is not left out."""
        part = models.PART
        names: dict[str, list[str]] = {name: [name] for name in self._inner.specs(part)}
        for alias, name in self._inner.metadata(part).items():
            if name in names:
                names[name].append(alias)
        self._specs[part] = {}
        for stored, known in names.items():
            kept = [new for each in known if (new := self._rename(each)) is not None]
            if kept:
                self._put(part, kept[0], stored)
                self._aliases.update(dict.fromkeys(kept[1:], kept[0]))

    def _rename_optimizer(self) -> None:
        part = optimizers.PART
        self._specs[part] = {}
        of_parameters = {
            name for group in self._inner.values.get(part, {}).get("groups", ())
            for name in group["names"]
        }  # fmt: skip
        for stored in self._inner.specs(part):
            name, _, key = stored.rpartition("/")
            renamed = self._rename(name) if name in of_parameters else name
            if renamed is not None:
                self._put(part, f"{renamed}/{key}" if name in of_parameters else stored, stored)

    def _put(self, part: str, name: str, stored: str) -> None:
        if name in self._specs[part]:
            raise ArgumentError(
                "load()", "rename",
                f"a function that makes '{name}' of both '{self._stored[part, name]}' and "
                f"'{stored}'", "one that gives different names",
            )  # fmt: skip
        self._stored[part, name] = stored
        self._specs[part][name] = replace(self._inner.specs(part)[stored], name=name)

    def _renamed_values(self) -> dict[str, Any]:
        values = dict(self._inner.values)
        for part in (models.PART, optimizers.PART):
            if part in values:
                values[part] = {**values[part], "others": self._keys(values[part]["others"])}
        if optimizers.PART in values:
            own = values[optimizers.PART]
            own["groups"] = [
                {**group, "names": list(self._keys(dict.fromkeys(group["names"])))}
                for group in own["groups"]
            ]
        return values

    def _keys(self, table: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: each for key, each in table.items() if (name := self._rename(key)) is not None
        }

"""Safetensors files: what stands where, known before a byte is written.

A file is the length of a header (8 bytes, little-endian), the header (JSON: each tensor's dtype,
shape and place), and the tensors' bytes without gaps. (The format of the safetensors project,
https://huggingface.co/docs/safetensors.) Since the header follows from names, dtypes and shapes
alone, every rank knows where its own bytes belong, and writes them there by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from mpizero.errors import ArgumentError, CheckpointError

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "C64": np.dtype(np.complex64),
}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}

LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000  # what the safetensors library reads
_FILE_NAME = re.compile(r"([a-z]+\d*)(-\d{5}-of-\d{5})?\.safetensors")
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a checkpoint: its name, dtype and shape."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _NAME_OF:
            raise ArgumentError(
                "save()", self.name, f"a tensor of {self.dtype}", f"one of {', '.join(DTYPES)}"
            )
        if self.name == _METADATA:
            raise ArgumentError("save()", "a tensor's name", repr(self.name), "another name")

    @property
    def count(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name}: {_NAME_OF[self.dtype]}, shape {self.shape}"


@dataclass(frozen=True)
class FileLayout:
    """A file of a checkpoint: its name, its header, and where in it each tensor begins."""

    name: str
    header: bytes  # with the length before it
    starts: Mapping[str, int]  # bytes from the file's beginning
    specs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]

    @cached_property
    def nbytes(self) -> int:
        return len(self.header) + sum(spec.nbytes for spec in self.specs.values())

    @property
    def part(self) -> str:
        """What it is a file of: "model", "optimizer", ..."""
        return part_of(self.name)


def lay_out(
    part: str, specs: Sequence[TensorSpec], largest: int, metadata: Mapping[str, str] | None = None
) -> list[FileLayout]:
    """The files of ``part``, none of more than ``largest`` bytes unless a tensor is larger.

    A single one is ``part.safetensors``; several are numbered in the usual way. Raises
    ArgumentError if two tensors have one name.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArgumentError("save()", part, f"two tensors named {twice!r}", "names that differ")
    bins: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if bins[-1] and filled + spec.nbytes > largest:
            bins.append([])
            filled = 0
        bins[-1].append(spec)
        filled += spec.nbytes
    count = len(bins)
    return [
        _one_file(
            f"{part}.safetensors" if count == 1 else f"{part}-{at:05}-of-{count:05}.safetensors",
            each,
            metadata or {},
        )
        for at, each in enumerate(bins, 1)
    ]


def index_of(files: Sequence[FileLayout]) -> bytes:
    """The usual index beside several files of one part: which tensor is in which."""
    total = sum(spec.nbytes for file in files for spec in file.specs.values())
    where = {name: file.name for file in files for name in file.specs}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1).encode()


def index_name(part: str) -> str:
    """What the index of a part's several files is called."""
    return f"{part}.safetensors.index.json"


def parse_header(name: str, nbytes: int, header: bytes, any_name: bool = False) -> FileLayout:
    """A file's layout from its header (with its length). Trusts nothing in it.

    ``any_name``: the file is called as others call theirs.

    Raises CheckpointError if it is not exactly what ``lay_out`` could have made of some tensors.
    """
    if not any_name:
        part_of(name)
    entries = _parse_json(name, header[LENGTH_BYTES:])
    metadata = entries.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(name, "its metadata is no table of strings")
    found = [(key, *_parse_entry(name, key, entry)) for key, entry in entries.items()]
    found.sort(key=lambda each: (each[2], each[3]))
    end, starts, specs = 0, {}, {}
    for key, spec, start, stop in found:
        if start != end or stop - start != spec.nbytes:
            raise damaged(name, f"tensor {key!r} is not where it should be")
        starts[key], specs[key] = len(header) + start, spec
        end = stop
    if len(header) + end != nbytes:
        raise damaged(name, f"it has {nbytes} bytes and its tensors {len(header) + end}")
    return FileLayout(name, header, starts, specs, metadata)


def header_length(name: str, nbytes: int, first: bytes) -> int:
    """Bytes of a header with its length, from the file's first 8 bytes."""
    length = int.from_bytes(first, "little") + LENGTH_BYTES
    if len(first) < LENGTH_BYTES or length > min(nbytes, _LARGEST_HEADER):
        raise damaged(name, "the length of its header cannot be right")
    return length


def part_of(name: str) -> str:
    """The part that a file belongs to. Raises CheckpointError for names of no such file."""
    found = _FILE_NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise CheckpointError(f"{name!r} is no name of a file of a checkpoint")
    return found[1]


def damaged(name: str, why: str) -> CheckpointError:
    """The error for a file that is not as it was written."""
    return CheckpointError(f"{name} is damaged, or was not written by mpizero: {why}.")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads``: a key that comes twice is an error, not whichever came last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _one_file(name: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> FileLayout:
    # The widest dtypes first, so that every tensor is aligned to its own; then as they came.
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    entries: dict[str, Any] = {_METADATA: {"format": "pt", **metadata}}
    at = 0
    for spec in ordered:
        entries[spec.name] = {
            "dtype": _NAME_OF[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    starts, at = {}, len(header)
    for spec in ordered:
        starts[spec.name] = at
        at += spec.nbytes
    return FileLayout(name, header, starts, {spec.name: spec for spec in ordered}, metadata)


def _parse_json(name: str, text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise damaged(name, f"its header cannot be read ({error})") from None
    if not isinstance(entries, dict):
        raise damaged(name, "its header is no table")
    return entries


def _parse_entry(name: str, key: str, entry: Any) -> tuple[TensorSpec, int, int]:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError
        np.broadcast_to(np.empty((), DTYPES[dtype]), shape)  # raises for what no array can have
        return TensorSpec(key, DTYPES[dtype], tuple(shape)), start, stop
    except (TypeError, ValueError, KeyError):
        raise damaged(name, f"what it says of tensor {key!r} cannot be right") from None

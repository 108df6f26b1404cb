"""Weights from safetensors files of others, read in parts into models of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mpizero_torch as mz
from mpizero.checkpoint import SafetensorsFiles

ranks = pytest.mark.parallel([1, 2, 3, 4])

WAYS = [
    pytest.param(None, id="plain"),
    pytest.param({"stage": 0}, id="0"),
    pytest.param({"stage": 1}, id="1"),
    pytest.param({"stage": 2, "precision": "bf16"}, id="2 bf16"),
    pytest.param({"stage": 3}, id="3"),
    pytest.param({"stage": 3, "share_parameters": False, "segment_mb": 0.0002}, id="3 private"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same on all ranks: rank 0's."""
    return Path(mz.init().broadcast_object(str(tmp_path)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(7, 5), nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.body(self.embed(x)))
        return found


def made(way: dict[str, Any] | None, build_deferred: bool) -> Any:
    torch.manual_seed(1)
    if way is None:
        return Tied()
    if build_deferred:
        with mz.deferred():
            model = Tied()
    else:
        model = Tied()
    return mz.zero(model, torch.optim.AdamW(model.parameters(), lr=0.1), **way)


def values() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {name: value.clone() for name, value in Tied().state_dict().items()}
    del found["head.weight"]  # as Hugging Face leaves it out
    return found


def write(folder: Path, tensors: dict[str, torch.Tensor], files: int) -> Path:
    """On rank 0: one file, or several with their index."""
    world = mz.init()
    if world.rank == 0:
        names = list(tensors)
        (folder / "config.json").write_text("{}")
        where = {}
        for at in range(files):
            name = (
                "model.safetensors"
                if files == 1
                else f"model-{at + 1:05}-of-{files:05}.safetensors"
            )
            own = names[at::files]
            save_file({each: tensors[each] for each in own}, folder / name)
            where.update(dict.fromkeys(own, name))
        if files > 1:
            text = json.dumps({"metadata": {}, "weight_map": where})
            (folder / "model.safetensors.index.json").write_text(text)
    world.barrier()
    return folder


@ranks
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("files", [1, 3])
def test_every_kind_of_model_gets_them(folder: Path, way: Any, files: int) -> None:
    wanted = values()
    path = write(folder, wanted, files)
    for build_deferred in (False, True):
        found = made(way, build_deferred)
        model = found if way is None else found[0]
        result = mz.load_pretrained(model, path)
        assert not result.missing_keys and not result.unexpected_keys
        state = {name: value.clone() for name, value in model.state_dict().items()}
        for name, value in {**wanted, "head.weight": wanted["embed.weight"]}.items():
            assert torch.equal(state[name], value), name
        if way is not None:
            model(torch.arange(7)).square().mean().backward()
            found[1].step()
            after = model.state_dict()["body.weight"]
            assert (after - wanted["body.weight"]).abs().max() < 0.2  # a step from there
            assert not torch.equal(after, wanted["body.weight"])


@ranks
@pytest.mark.parametrize("way", WAYS)
def test_names_and_shapes_that_do_not_fit(folder: Path, way: Any) -> None:
    wanted = values()
    theirs = {f"net.{name}": value for name, value in wanted.items() if name != "body.bias"}
    theirs["net.other"] = torch.ones(2)
    path = write(folder, {name: value.double() for name, value in theirs.items()}, 1)
    found = made(way, True)
    model = found if way is None else found[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(mz.ArgumentError, match="not one"):
        mz.load_pretrained(model, path, strict=False)

    def inner(name: str) -> str:
        return name.removeprefix("net.")

    with pytest.raises(mz.ArgumentError, match=r"missing: body\.bias; unexpected: other"):
        mz.load_pretrained(model, path, rename=inner)
    with pytest.raises(mz.ArgumentError, match=r"'body\.bias' of shape"):
        mz.load_pretrained(model, path, rename={"net.body.weight": "body.bias"}, strict=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result = mz.load_pretrained(model, path, rename=inner, strict=False)
    assert result.missing_keys == ["body.bias"] and result.unexpected_keys == ["other"]
    for name, value in model.state_dict().items():
        kept = before if name == "body.bias" else {**wanted, "head.weight": wanted["embed.weight"]}
        assert torch.equal(value, kept[name]), name


@ranks
def test_a_rank_reads_what_it_keeps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = mz.init()
    weights = {"weight": torch.rand(90, 100), "bias": torch.rand(90)}
    path = write(folder, weights, 1)
    with mz.deferred():
        plain = nn.Linear(100, 90)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    model, _ = mz.zero(plain, optimizer, stage=3, share_parameters=False)
    count = 0
    read = SafetensorsFiles.read

    def counted(self: Any, part: str, name: str, elements: slice | None = None) -> Any:
        nonlocal count
        found = read(self, part, name, elements)
        count += found.size
        return found

    monkeypatch.setattr(SafetensorsFiles, "read", counted)
    mz.load_pretrained(model, path)
    assert abs(count - 9090 / world.size) < 100  # blocks are as good as even
    whole = world.broadcast_object(weights["weight"].numpy().tobytes())
    assert model.state_dict()["weight"].numpy().tobytes() == whole


@pytest.mark.parallel([1, 2])
def test_files_that_are_none(folder: Path) -> None:
    world = mz.init()
    model = Tied()
    with pytest.raises(mz.CheckpointError, match="neither"):
        mz.load_pretrained(model, folder / "nothing")
    with pytest.raises(mz.CheckpointError, match="0 files"):
        mz.load_pretrained(model, folder)
    write(folder, values(), 1)
    if world.rank == 0:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
    world.barrier()
    with pytest.raises(mz.CheckpointError, match=r"model\.safetensors"):
        mz.load_pretrained(model, folder)
    with mz.deferred():
        model = Tied()
    world.barrier()
    write(folder, values(), 1)
    with pytest.raises(mz.ArgumentError, match=r"mz\.zero\(model"):
        mz.load_pretrained(model, folder)

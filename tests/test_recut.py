"""Checkpoints are cut anew: saved by n ranks at any stage, loaded by m ranks at any other.

What is loaded is compared bit for bit with what was saved, as one process has it; then one more
step is trained, and compared with that of one process.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import mpizero_torch as mz
from support import recut
from support.launch import mpirun
from support.recut import Way

ranks = pytest.mark.parallel([1, 2, 3, 4])

STAGES = [Way(stage) for stage in range(4)]

# Of the 1024 pairs of eight ranks and four stages. All take two minutes on two cores.
THIN = 1 if os.environ.get("MPIZERO_TEST_ALL") == "1" else 4

EIGHT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import mpizero_torch as mz
from support import recut
world = mz.init()
ways = [recut.Way(stage) for stage in range(4)]
wrong = recut.every_pair(Path(sys.argv[1]), world, ways, thin=int(sys.argv[3]))
if world.rank == 0:
    print(len(wrong), "wrong", *wrong[:20], sep="\\n")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same on all ranks: rank 0's."""
    return Path(mz.init().broadcast_object(str(tmp_path)))


@ranks
def test_every_pair_of_ranks_and_stages(folder: Path) -> None:
    assert recut.every_pair(folder, mz.init(), STAGES, recut.sgd, THIN) == []


@pytest.mark.once
@pytest.mark.timeout(600)
def test_every_pair_of_up_to_eight_ranks(tmp_path: Path) -> None:
    """Every n and m, and every s and t; all combinations of the four with MPIZERO_TEST_ALL=1."""
    program = tmp_path / "every_pair.py"
    program.write_text(EIGHT)
    tests = str(Path(__file__).parent)
    result = mpirun(8, [str(program), str(tmp_path), tests, str(THIN)], timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("0\nwrong"), result.stdout


ways = st.builds(
    Way,
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from(["flat", "parameter"]),
)


@ranks
@settings(max_examples=12)
@given(data=st.data())
def test_any_way_to_any_other(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Parameters shared by the node or not, either partition, and files of any size."""
    world = mz.init()
    n, m = (data.draw(st.integers(1, world.size)) for _ in range(2))
    saved_way, loaded_way = data.draw(ways), data.draw(ways)
    largest = data.draw(st.sampled_from([100, 1000, 1 << 30]))
    make = data.draw(st.sampled_from([recut.adamw, recut.sgd]))
    folder = Path(world.broadcast_object(str(tmp_path_factory.mktemp("recut"))))
    with recut.part_of(world, range(n)) as savers:
        found = None
        if savers is not None:
            found = recut.save(folder / "c", saved_way, savers, make, 3, largest_file=largest)
        saved = world.broadcast_object(found)
    after = recut.next_step(saved, make, 9)
    wrong: list[str] = []
    with recut.part_of(world, range(world.size - m, world.size)) as loaders:
        if loaders is not None:
            model, optimizer = recut.spread(loaded_way, loaders, make, 1)
            wrong = recut.loaded(folder / "c", model, optimizer, loaders, saved, after, 9)
    everyones = [each for part in world.gather_objects(wrong) for each in part]
    assert everyones == [], f"{saved_way} by {n}, {loaded_way} by {m}"


@ranks
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_float32_copies_of_16_bit_parameters(folder: Path, stage: int) -> None:
    """What is trained is saved: the float32 values, which the next run goes on from."""
    world = mz.init()
    saved_way = Way(stage, precision="bf16")
    saver, its = recut.spread(saved_way, world, recut.adamw, 0, torch.float32)
    recut.train(saver, its, 0, world.rank, world.size)
    mz.save(folder / "c", model=saver, optimizer=its)
    saved = recut.record(saver, its)
    stored = load_file(folder / "c" / "model.safetensors")
    assert stored["mix.weight"].dtype == torch.float32
    assert (stored["mix.weight"].bfloat16().float() != stored["mix.weight"]).any()
    for other_stage in (1, 2, 3):
        model, optimizer = recut.spread(
            Way(other_stage, precision="bf16"), world, recut.adamw, 1, torch.float32
        )
        mz.load(folder / "c", model=model, optimizer=optimizer)
        assert recut.differences(recut.record(model, optimizer), saved) == []
        mz.save(folder / "d", model=model, optimizer=optimizer)
        again = load_file(folder / "d" / "model.safetensors")
        assert all(torch.equal(again[name], value) for name, value in stored.items())
        world.barrier()


@ranks
def test_the_usual_index_names_every_tensors_file(folder: Path) -> None:
    """As those read it who know large models in several files."""
    world = mz.init()
    model, optimizer = recut.spread(Way(3), world, recut.adamw, 0)
    mz.save(folder / "c", model=model, optimizer=optimizer, largest_file=300)
    index = json.loads((folder / "c" / "model.safetensors.index.json").read_text())
    files = {name: load_file(folder / "c" / name) for name in set(index["weight_map"].values())}
    assert len(files) > 2
    read = {name: files[file][name] for name, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in read.values())
    expected = model.state_dict()
    assert {*expected} - {*read} == {"head.weight"}  # tied
    for name, value in read.items():
        assert torch.equal(value, expected[name]), name

"""A batch's weight travels with it: what carries it, what loses it, and who is told."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from mpizero import ArgumentError
from mpizero.engine import Weight
from mpizero_torch import batch_weight
from mpizero_torch.batch_weight import Loop, doubt, fed, fed_on, hand_out, of_pass, of_value
from mpizero_torch.weighed_tensor import Outlet, live

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test ends without marks, as it began: nothing may keep them."""
    yield
    with torch.no_grad():
        fed((), None)  # what was fed before is forgotten
    if live:
        gc.collect()
    assert not live and doubt() is None


def batch(weight: float = 0.5, *shape: int) -> torch.Tensor:
    found: torch.Tensor = hand_out(torch.rand(shape or (4, 3)), weight)
    return found


def weight_of(values: Any) -> float:
    return fed(values, None)[0].value


def test_a_batch_of_weight_one_is_what_it_was() -> None:
    x = {"x": torch.ones(2), "names": ["a"]}
    assert hand_out(x, 1.0) is x
    values = ((x,), {})
    weight, plain = fed(values, None)
    assert weight == Weight() and plain is values


def test_a_marked_tensor_is_like_the_plain_one() -> None:
    plain = torch.arange(12.0).reshape(4, 3)
    x = hand_out(plain, 0.5)
    assert isinstance(x, torch.Tensor) and type(plain) is torch.Tensor
    assert repr(x) == repr(plain) and f"{x.sum():.2f}" == "66.00" and len(x) == 4
    assert x.data_ptr() == plain.data_ptr() and x.shape == (4, 3) and x.is_leaf
    weight, seen = fed(x, None)
    assert weight == Weight(0.5) and type(seen) is torch.Tensor
    assert seen.data_ptr() == plain.data_ptr() and isinstance(x, type(x[0]))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


TRANSFORMS: dict[str, Callable[[torch.Tensor], Any]] = {
    "to": lambda x: x.to(torch.float64),
    "to the same": lambda x: x.to("cpu"),
    "float() / 255": lambda x: x.float() / 255,
    "one minus": lambda x: 1 - x,
    "index": lambda x: x[1:3],
    "mask": lambda x: x[x > -1],
    "permute": lambda x: x[torch.randperm(4)],
    "transpose": lambda x: x.T,
    "type": lambda x: x.type(torch.float64),
    "cat": lambda x: torch.cat([torch.zeros(1, 3), x]),
    "stack of samples": lambda x: torch.stack([*x]),
    "sum of samples": lambda x: sum(x),
    "unbind": lambda x: x.unbind(0),
    "split": lambda x: x.split(2)[1],
    "max": lambda x: x.max(0),
    "einsum": lambda x: torch.einsum("ij,ij->i", x, torch.rand(4, 3)),
    "where": lambda x: torch.where(torch.rand(4, 3) > 0.5, x, torch.zeros(())),
    "pad": lambda x: F.pad(x, (1, 1)),
    "pad_sequence": lambda x: pad_sequence([x[0], x[1, :2]]),
    "packed": lambda x: pack_padded_sequence(x[None], torch.tensor([4]), batch_first=True),
    "interpolate": lambda x: F.interpolate(x[None], size=6),
    "like": torch.rand_like,
    "new": lambda x: x.new_zeros(3),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "in place": lambda x: x.sub_(0.5),
    "augmented in place": lambda x: x.__setitem__(0, torch.zeros(3)) or x,
    "as_tensor": torch.as_tensor,
    "normalised": lambda x: (x - x.mean(0)) / x.std(0),
    "loss": lambda x: F.mse_loss(torch.rand(4, 3), x),
    "loss by module": lambda x: nn.L1Loss()(torch.rand(4, 3), x),
    "layer": lambda x: nn.Linear(3, 2)(x),
    "own function": Double.apply,
    "own function by an operator": lambda x: torch.ops.aten.mul(x, 2),
    "collate": lambda x: torch.utils.data.default_collate([x[0], x[1]]),
    "one hot": lambda x: F.one_hot((x > 0.5).long()),
    "sparse": lambda x: x.to_sparse(),
    "complex": lambda x: torch.fft.rfft(x),
    "share": lambda x: x.share_memory_(),
    "leaf": lambda x: torch.zeros_like(x, requires_grad=True),
    "unique": lambda x: torch.unique(x, return_counts=True),
    "foreach": lambda x: torch._foreach_mul([x, x], 2),
    "checkpointed": lambda x: torch.utils.checkpoint.checkpoint(
        Double.apply, x, use_reentrant=False
    ),
    "gradient": lambda x: torch.autograd.grad(x.requires_grad_().square().sum(), x)[0],
    "scripted module": lambda x: torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3))(x),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_is_computed_of_a_batch_weighs_the_same(name: str) -> None:
    assert weight_of(TRANSFORMS[name](batch())) == 0.5
    assert doubt() is None


@pytest.mark.parametrize("name", sorted({*TRANSFORMS} - {"like", "permute", "where", "einsum"}))
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_values_are_those_of_plain_tensors(name: str) -> None:
    function = TRANSFORMS[name]
    values = torch.rand(4, 3)

    def of(x: torch.Tensor) -> Any:
        torch.manual_seed(1)
        return torch.utils._pytree.tree_leaves(fed(function(x), None)[1])

    for ours, theirs in zip(of(hand_out(values.clone(), 0.5)), of(values.clone()), strict=True):
        assert type(ours) is type(theirs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_leaves_stay_leaves_and_get_their_gradients() -> None:
    x = batch()
    delta = torch.zeros_like(x, requires_grad=True)
    (x + delta).square().sum().backward()
    torch.testing.assert_close(fed(delta.grad, None)[1], 2 * fed(x, None)[1])
    x.requires_grad_()
    nn.Linear(3, 1)(x).sum().backward()
    assert x.grad is not None and delta.is_leaf and x.is_leaf


def test_backward_runs_as_without_marks() -> None:
    """Hooks in there, and what is computed again, find torch's functions as they are."""
    seen = []
    layer = nn.Linear(3, 1)

    def hook(gradient: torch.Tensor) -> None:
        seen.append(torch._C._is_torch_function_enabled())

    layer.weight.register_hook(hook)
    F.mse_loss(layer(torch.rand(4, 3)), batch(0.5, 4, 1)).backward()
    torch.autograd.backward(F.mse_loss(layer(torch.rand(4, 3)), batch(0.5, 4, 1)))
    assert seen == [True, True]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_functions_pass_it_on() -> None:
    compiled = torch.compile(lambda x: (x.flip(0) / 255).mean(), backend="eager")
    x = batch()
    assert weight_of(compiled(x)) == 0.5
    assert weight_of(compiled(torch.rand(4, 3))) == 1.0, "the compiler's looks are not an escape"


Pair = namedtuple("Pair", "x label")


@dataclass(frozen=True)
class Data:
    x: Any
    label: int = 3


class Slots:
    __slots__ = ("__hidden", "x")

    def __init__(self, x: Any) -> None:
        self.x, self.__hidden = x, 1


class Hidden:
    __slots__ = ("__x",)

    def __init__(self, x: Any) -> None:
        self.__x = x

    @property
    def x(self) -> Any:
        return self.__x


class Store(dict):  # type: ignore[type-arg]
    """Knows its owner, as the parts of graph batches do."""

    owner: Any = None


class Graph:
    """Copies its parts along when it is copied."""

    def __init__(self, x: Any) -> None:
        self.store = Store(x=x)
        self.store.owner = self

    def __copy__(self) -> Graph:
        return Graph(self.store["x"])

    @property
    def x(self) -> Any:
        assert self.store.owner is self
        return self.store["x"]


class AttributeDict(dict):  # type: ignore[type-arg]
    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        self.__dict__ = self


class Encoding(UserDict):  # type: ignore[type-arg]
    """As transformers' BatchEncoding is built."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getstate__(self) -> Any:
        return {"data": self.data}

    def __setstate__(self, state: Any) -> None:
        self.data = state["data"]


@dataclass
class Output(OrderedDict):  # type: ignore[type-arg]
    """As transformers' ModelOutput is built: keys are attributes, and know one another."""

    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for name in ("logits", "hidden"):
            self[name] = getattr(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __reduce__(self) -> Any:
        return type(self), (self.logits, self.hidden)


def family(x: Any) -> Any:
    child = SimpleNamespace(x=x)
    child.parent = SimpleNamespace(child=child)
    return child.parent


CONTAINERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "dict": (lambda x: {"x": x, "n": 3}, lambda b: b["x"]),
    "ordered": (lambda x: OrderedDict(x=x), lambda b: b["x"]),
    "list": (lambda x: [None, x], lambda b: b[1]),
    "deque": (lambda x: deque([x]), lambda b: b[0]),
    "tuple": (lambda x: (x, 1.5), lambda b: b[0]),
    "namedtuple": (lambda x: Pair(x, 1), lambda b: b.x),
    "set": (lambda x: {x}, lambda b: next(iter(b))),
    "nested": (lambda x: {"a": [(x, {"b": x})]}, lambda b: b["a"][0][1]["b"]),
    "user dict": (lambda x: UserDict(x=x, data=1), lambda b: b["x"]),
    "dataclass": (Data, lambda b: b.x),
    "object": (lambda x: SimpleNamespace(x=x), lambda b: b.x),
    "slots": (Slots, lambda b: b.x),
    "private slots": (Hidden, lambda b: b.x),
    "graph": (Graph, lambda b: b.x),
    "attributes": (lambda x: AttributeDict(x=x), lambda b: b.x),
    "attributes as keys": (lambda x: AttributeDict(x=x), lambda b: b["x"]),
    "in objects": (lambda x: Data(Data(SimpleNamespace(x=[x]))), lambda b: b.x.x.x[0]),
    "cycle": (family, lambda b: b.child.parent.child.x),
    "encoding": (lambda x: Encoding(ids=x), lambda b: b.ids),
    "model output": (lambda x: Output(x, (x, x)), lambda b: b.logits),
    "parts of a model output": (lambda x: Output(x, (x, x)), lambda b: b["hidden"][1]),
    "structure": (lambda x: torch.max(x, 0), lambda b: b.values),
    "packed": (
        lambda x: pack_padded_sequence(x[None], torch.tensor([4]), batch_first=True),
        lambda b: b.data,
    ),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_batches_of_any_make_are_marked_and_stripped_in_copies(name: str) -> None:
    make, get = CONTAINERS[name]
    plain = make(torch.rand(4, 3))
    weighed = hand_out(plain, 0.5)
    assert type(weighed) is type(plain)
    assert type(get(plain)) is torch.Tensor, "the batch itself must stay as it is"
    torch.testing.assert_close(fed(get(weighed), None)[1], get(plain), rtol=0, atol=0)
    assert weight_of(get(weighed)) == 0.5
    weight, seen = fed(((weighed,), {"k": weighed}), None)
    assert weight == Weight(0.5)
    assert type(get(seen[0][0])) is torch.Tensor and type(get(seen[1]["k"])) is torch.Tensor
    assert weight_of(get(weighed)) == 0.5, "being fed must not take the weight from it"
    again = hand_out(weighed, 2.0)
    assert weight_of(again) == 2.0 and weight_of(weighed) == 0.5


def test_what_a_module_gives_back_weighs_what_it_was_fed() -> None:
    weight, seen = fed(batch(), None)
    with batch_weight.under_way(weight):
        inner, _ = fed(seen * 2, None)
        assert inner == Weight(0.5), "a module within the module"
        fed_on(seen)
        output = Data(seen * 2)
    assert weight_of(fed_on(output)) == 0.5
    weight, seen = fed(torch.rand(3), None)
    assert fed_on(seen) is seen


def test_what_is_too_deep_to_be_looked_for_is_found_where_it_is_used() -> None:
    hidden = batch()
    for _ in range(8):
        hidden = SimpleNamespace(x=hidden)
    weight, seen = fed(hidden, None)
    assert weight == Weight() and seen is hidden
    for _ in range(8):
        hidden = hidden.x
    with batch_weight.under_way(weight), pytest.raises(ArgumentError, match="within the module"):
        hidden * 2


class Opaque:
    __slots__ = ()


ESCAPES: dict[str, Callable[[torch.Tensor], Any]] = {
    "numpy": lambda x: torch.from_numpy(x.numpy() / 255),
    "asarray": lambda x: torch.from_numpy(np.asarray(x)[:, :2].copy()),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "numbers": lambda x: torch.tensor([[value.item() for value in row] for row in x]),
    "float": lambda x: torch.tensor([float(row[0]) for row in x]),
    "tensor of tensors": lambda x: torch.tensor([row[0] for row in x]),
    "dlpack": torch.from_dlpack,
    "storage": lambda x: torch.empty(0).set_(x.untyped_storage()),
    "another class": lambda x: x.as_subclass(torch.Tensor),
    "pickled": lambda x: pickle.loads(pickle.dumps(x)),
    "copied to": lambda x: torch.zeros(4, 3).copy_(x),
    "out": lambda x: torch.mul(x, 2, out=torch.zeros(4, 3)),
    "in place": lambda x: torch.zeros(4, 3).add_(x),
    "item of": lambda x: _set(torch.zeros(4, 3), x),
    "inference": lambda x: _inference(x),
    "many": lambda x: _copied(x),
}


def _set(target: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    target[:2] = x[:2]
    return target


def _copied(x: torch.Tensor) -> torch.Tensor:
    target = torch.zeros(4, 3)
    torch._foreach_copy_([target], [x])
    return target


@torch.inference_mode()
def _inference(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(4, 3).copy_(x)


@pytest.mark.parametrize("name", ESCAPES)
def test_where_content_cannot_be_followed_an_unmarked_input_is_refused(name: str) -> None:
    x = batch()
    seen = ESCAPES[name](x)
    assert type(seen) is torch.Tensor
    with pytest.raises(ArgumentError, match=r"weighs 0\.5 has gone .* model\.weigh"):
        fed(seen, None)
    assert "weighs 0.5" in str(doubt())
    assert weight_of(x) == 0.5, "the batch itself is known"
    stated, _ = fed(seen, Weight(3.0, stated=True))
    assert stated == Weight(3.0, stated=True)


@pytest.mark.parametrize(
    "question",
    [
        lambda x: (x.shape, x.size(0), x.dtype, x.device, len(x), x.numel(), x.stride(), x.dim()),
        lambda x: (repr(x), str(x), f"{x.sum():.3f}", x.is_contiguous(), x.is_floating_point()),
        lambda x: (x.requires_grad, x.is_leaf, x.grad_fn, x.grad, hash(x), x.layout, x._version),
        lambda x: torch.zeros(4, 3).expand_as(x) is x or x.is_cuda or x.is_pinned(),
        lambda x: x.register_hook(print) if x.requires_grad_().requires_grad else None,
        lambda x: hand_out((x, None), 0.25),
    ],
)
def test_questions_about_the_form_let_nothing_escape(question: Callable[[Any], Any]) -> None:
    x = batch()
    question(x)
    assert doubt() is None and weight_of(torch.rand(3)) == 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.zeros(3), lambda: "name", lambda: b"bytes", Opaque, lambda: 7, lambda: True,
        lambda: nn.Parameter(torch.zeros(2)), lambda: np.int64(3),
    ],
)  # fmt: skip
def test_what_cannot_be_marked_in_a_batch_has_escaped(make: Callable[[], Any]) -> None:
    other = make()
    x = hand_out((torch.rand(2), other), 0.5)
    assert weight_of(x) == 0.5 and x[1] is other
    with pytest.raises(ArgumentError, match=f"{type(other).__name__} in the batch"):
        fed(torch.rand(2), None)


def test_a_number_is_forgotten_with_the_tensors_and_content_with_the_loader() -> None:
    outlet = Outlet()
    loop = Loop(outlet, uneven=True)
    x = loop.hand_out(torch.rand(4), 0.5)
    x.sum().item()
    assert doubt()
    del x
    assert doubt(), "it is at hand"
    loop.hand_out(torch.rand(4), 1.0)
    assert doubt() is None
    loop.hand_out(torch.rand(4), 0.5).tolist()
    loop.end()
    assert doubt(), "what was made of it may come from the same loader's thread"
    del loop, outlet
    assert doubt() is None
    array = batch().numpy()
    assert doubt(), "the array is there"
    del array


def test_batches_of_several_weights_are_refused_or_stated() -> None:
    a, b, c = batch(0.5), batch(2.0), batch(0.5)
    for mixed in ((a, b), torch.cat([a, b]), a + b, a.add_(b)):
        with pytest.raises(ArgumentError, match=r"several batches that weigh (0\.5, 2|2, 0\.5)"):
            fed(mixed, None)
        assert fed(mixed, Weight(7.0, stated=True))[0] == Weight(7.0, stated=True)
    a = batch(0.5)
    assert weight_of((a, c)) == weight_of(torch.cat([a, c])) == 0.5
    total = torch.zeros(())
    for _ in range(50):
        total = total + batch(0.5).sum() + batch(1.5).sum()
    assert len(live) < 30, "a sum over an epoch does not keep all its batches' marks"
    del total


def test_a_buffer_that_takes_batches_over_weighs_what_was_copied_last() -> None:
    buffer = torch.zeros_like(batch(0.5))
    for weight in (0.5, 2.0, 1.5):
        buffer.copy_(batch(weight))
        assert weight_of(buffer) == weight
    buffer[0] = batch(0.5)[0]
    with pytest.raises(ArgumentError, match="several"):
        fed(buffer, None)


def test_the_filler_of_an_idle_rank_counts_nothing_whatever_is_stated() -> None:
    idle = batch(0.0)
    assert fed(idle, None)[0] == Weight(0.0)
    assert fed((idle, 3), Weight(5.0, stated=True))[0] == Weight(0.0, stated=True)
    assert fed((idle, batch(0.5)), Weight(5.0, stated=True))[0] == Weight(5.0, stated=True)


def test_without_gradients_no_weight_is_needed_until_it_is_asked_for() -> None:
    x = batch()
    seen = torch.from_numpy(x.numpy())
    with torch.no_grad():
        weight, _ = fed(seen, None)
        assert weight.value == 1.0
        with batch_weight.under_way(weight), pytest.raises(ArgumentError, match="numpy"):
            of_pass()
        fed((x, batch(2.0)), None)


def test_a_batch_that_a_module_has_by_another_way_is_refused_in_its_forward() -> None:
    hidden = batch(0.5)
    weight, seen = fed(torch.rand(4, 3), None)
    with batch_weight.under_way(weight), pytest.raises(ArgumentError, match="within the module"):
        seen * hidden
    with batch_weight.under_way(Weight(0.5)):
        seen * hidden
    with batch_weight.under_way(Weight(3.0, stated=True)):
        seen * hidden


def test_the_weight_of_a_pass_is_that_of_its_thread() -> None:
    found = []
    assert of_pass() == 1.0
    with batch_weight.under_way(Weight(0.5)):
        with batch_weight.under_way(Weight(2.0)):
            assert of_pass() == 2.0
        thread = threading.Thread(target=lambda: found.append(of_pass()))
        thread.start(), thread.join()
        assert of_pass() == 0.5
    assert of_pass() == 1.0 and found == [1.0]


def test_the_weight_of_a_value() -> None:
    assert of_value(3.0) == of_value(torch.ones(2)) == 1.0
    assert of_value(batch(0.5).mean()) == of_value({"a": batch(0.5), "b": 1}) == 0.5
    with pytest.raises(ArgumentError, match="weight="):
        of_value(batch(0.5).mean() + batch(2.0).mean())
    first, second = Loop(Outlet(), uneven=True), Loop(Outlet(), uneven=True)
    a = first.hand_out(torch.rand(3), 0.5)
    assert of_value(3.0) == 0.5
    b = second.hand_out(torch.rand(3), 2.0)
    with pytest.raises(ArgumentError, match=r"2 loops .* weight="):
        of_value(3.0)
    assert of_value(a) == 0.5 and of_value(b) == 2.0
    first.end()
    assert of_value(3.0) == 2.0
    fed(b, None)
    assert of_value(3.0) == 2.0
    c = second.hand_out(torch.rand(3), 0.25)
    with pytest.raises(ArgumentError, match="last fed weighs 2"):
        of_value(3.0)  # a reader is ahead of the training, which has this number
    fed(c, None)
    assert of_value(3.0) == 0.25
    del second
    assert of_value(3.0) == 1.0


def test_saved_and_shared_tensors_are_plain() -> None:
    plain = torch.rand(4)
    x = hand_out(plain, 0.5)
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)["x"]
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
    queue: Any = torch.multiprocessing.get_context("spawn").SimpleQueue()
    queue.put(x)
    received = queue.get()
    assert type(received) is torch.Tensor
    torch.testing.assert_close(received, plain, rtol=0, atol=0)


def test_several_tensors_are_copied_apart() -> None:
    """A number that one copy had must not be taken for the other's."""
    pair = hand_out([torch.zeros(3), torch.ones(3)], 0.5)
    first, second = copy.deepcopy(pair)
    assert first.sum() == 0 and second.sum() == 3
    same = copy.deepcopy([pair[0], pair[0]])
    assert same[0] is same[1]


def test_what_a_batch_only_refers_to_is_left_alone() -> None:
    data = torch.utils.data.TensorDataset(torch.rand(4))
    layer = nn.Linear(2, 2)
    weighed = hand_out(SimpleNamespace(x=torch.rand(2), data=data, layer=layer), 0.5)
    assert weighed.data is data and weighed.layer is layer
    assert type(data.tensors[0]) is torch.Tensor and doubt() is None


def test_a_batch_of_a_class_that_allows_no_copy_has_escaped() -> None:
    class Fixed:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

        def __copy__(self) -> Fixed:
            raise TypeError("one only")

    fixed = Fixed(torch.rand(3))
    assert hand_out(fixed, 0.5) is fixed
    array = hand_out((fixed, np.zeros(3)), 0.5)
    with pytest.raises(ArgumentError, match="in the batch"):
        fed(fixed.x, None)
    del array
    proxy = hand_out((MappingProxyType({"x": torch.rand(2)}), torch.rand(2)), 0.5)
    with pytest.raises(ArgumentError, match="in the batch"):
        fed(proxy[0]["x"], None)

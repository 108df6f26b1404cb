"""Train a small network data-parallel with no framework: mpizero's core, and numpy.

    mpirun -n 2 python examples/numpy_only.py [--zero]

Two layers tell handwritten digits apart (scikit-learn's bundled 8 x 8 images). A fifth of the
images is held out; with the default options the accuracy on them ends above TARGET. With --zero
each rank keeps the momentum of, and updates, its share of the weights only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np

import mpizero
from common import Reporter, load_digits, option_parser, positive
from mpizero.sampling import Batch, ShardedBatches

TARGET = 0.95
SHAPES = {"w1": (64, 64), "b1": (64,), "w2": (64, 10), "b2": (10,)}

Array = np.ndarray[Any, Any]


def parse() -> argparse.Namespace:
    parser = option_parser(__doc__, steps=400)
    parser.add_argument("--batch-size", type=positive, default=32, help="images per rank and step")
    parser.add_argument("--zero", action="store_true", help="shard the optimizer over the ranks")
    parser.add_argument("--lr", type=float, default=0.2, help="highest learning rate")
    return parser.parse_args()


def views(flat: Array) -> dict[str, Array]:
    """Named arrays of SHAPES inside one vector, so that one message carries all of them."""
    ends = np.cumsum([np.prod(shape) for shape in SHAPES.values()])
    parts = np.split(flat, ends[:-1])
    return {name: part.reshape(SHAPES[name]) for name, part in zip(SHAPES, parts, strict=True)}


def initial_weights(seed: int) -> Array:
    """Random matrices, zero biases."""
    flat = np.zeros(sum(int(np.prod(shape)) for shape in SHAPES.values()))
    random = np.random.default_rng(seed)
    for array in views(flat).values():
        if array.ndim == 2:
            array[...] = random.normal(scale=np.sqrt(2 / array.shape[0]), size=array.shape)
    return flat


def forward(weights: dict[str, Array], x: Array) -> tuple[Array, Array]:
    """The hidden layer, and the logarithms of each digit's chance."""
    hidden = np.maximum(x @ weights["w1"] + weights["b1"], 0)
    scores = hidden @ weights["w2"] + weights["b2"]
    scores -= scores.max(axis=1, keepdims=True)
    return hidden, scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def loss_and_gradient(flat: Array, x: Array, y: Array) -> tuple[float, Array]:
    """The mean cross-entropy over the images, and its derivative by the weights."""
    weights, gradient = views(flat), np.empty_like(flat)
    hidden, logs = forward(weights, x)
    rows = np.arange(len(y))
    by_scores = np.exp(logs)
    by_scores[rows, y] -= 1
    by_scores /= len(y)
    by_hidden = by_scores @ weights["w2"].T * (hidden > 0)
    into = views(gradient)
    into["w2"][...], into["b2"][...] = hidden.T @ by_scores, by_scores.sum(axis=0)
    into["w1"][...], into["b1"][...] = x.T @ by_hidden, by_hidden.sum(axis=0)
    return -float(logs[rows, y].mean()), gradient


def endless(batches: ShardedBatches) -> Iterator[Batch]:
    """Epoch after epoch."""
    for epoch in count():
        yield from batches.epoch(epoch)


class Replicated:
    """Gradient descent with momentum: every rank updates all weights, alike, in place."""

    def __init__(self, flat: Array, world: mpizero.World) -> None:
        self._flat, self._world = flat, world
        self._momentum = np.zeros_like(flat)

    def step(self, gradient: Array, lr: float) -> None:
        self._world.allreduce(gradient, op="mean")
        self._momentum = 0.9 * self._momentum + gradient
        self._flat -= lr * self._momentum


class Sharded:
    """The same, but every rank keeps the momentum of, and updates, its share of the weights."""

    def __init__(self, flat: Array, world: mpizero.World) -> None:
        self._weights = views(flat)
        shards = mpizero.ShardedState.scatter(self._weights, world)
        self._optimizer = mpizero.optim.SGD(shards, momentum=0.9)

    def step(self, gradient: Array, lr: float) -> None:
        self._optimizer.groups[0]["lr"] = lr
        self._optimizer.step(views(gradient))
        for name, array in self._optimizer.parameters.allgather(self._weights).items():
            self._weights[name][...] = array


def train(
    flat: Array,
    images: tuple[Array, Array],
    options: argparse.Namespace,
    world: mpizero.World,
    report: Reporter,
) -> None:
    """Update ``flat`` in place, alike on every rank."""
    x, y = images
    batches = ShardedBatches(len(y), options.batch_size, world.rank, world.size, seed=options.seed)
    optimizer = Sharded(flat, world) if options.zero else Replicated(flat, world)
    for step, batch in zip(range(options.steps), endless(batches), strict=False):
        loss, gradient = loss_and_gradient(flat, x[batch.indices], y[batch.indices])
        # An epoch's last batch may be short on some ranks: the weight makes the mean over ranks
        # the mean over images.
        gradient *= batch.weight
        optimizer.step(gradient, options.lr * (1 - step / options.steps))
        loss = world.allreduce(loss * batch.weight, op="mean")
        seen = world.allreduce(len(batch.indices) if batch.weight else 0)
        report.step(loss, seen)


def accuracy(flat: Array, images: tuple[Array, Array], world: mpizero.World) -> float:
    """The share of images told right; every rank looks at its part of them."""
    x, y = (part[world.rank :: world.size] for part in images)
    _, logs = forward(views(flat), x)
    right = world.allreduce(int((logs.argmax(axis=1) == y).sum()))
    return float(right / len(images[1]))


def main() -> None:
    options = parse()
    world = mpizero.init()
    training, held_out = load_digits()
    flat = initial_weights(options.seed)
    world.broadcast(flat)
    with Reporter(options, world, unit="images") as report:
        train(flat, training, options, world, report)
    right = accuracy(flat, held_out, world)
    report.say(
        f"held-out accuracy {right:.2%}; the default options' target, above {TARGET:.0%}, "
        f"is {'reached' if right > TARGET else 'not reached'}"
    )
    report.finish(held_out_accuracy=right, target=TARGET, reached=right > TARGET)


if __name__ == "__main__":
    main()

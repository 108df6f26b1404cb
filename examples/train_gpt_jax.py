"""Train a byte-level GPT on real text with JAX and Optax, over all ranks.

    mpirun -n 2 python examples/train_gpt_jax.py --plot loss.png
    mpirun -n 2 python examples/train_gpt_jax.py --zero

The text and the model's shape are those of ``train_gpt.py``: the Python standard library's own
source, or what ``--text`` names; its last twentieth is held out, and the held-out loss is to end
below TARGET nats a byte.
"""

from __future__ import annotations

import argparse
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpizero_jax as mj
from common import Reporter, option_parser, positive

TARGET = 1.65
MAX_BYTES = 4_000_000


def parse() -> argparse.Namespace:
    parser = option_parser(__doc__, steps=600)
    parser.add_argument("--text", nargs="+", type=Path, metavar="FILE", help="train on these")
    for name, default, what in (
        ("--layers", 4, "blocks"),
        ("--heads", 4, "attention heads"),
        ("--width", 128, "size of a token's vector"),
        ("--context", 128, "bytes that the model sees"),
        ("--batch-size", 8, "windows per rank and step"),
    ):
        parser.add_argument(name, type=positive, default=default, help=what)
    parser.add_argument("--zero", action="store_true", help="spread the optimizer's state")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    options = parser.parse_args()
    if options.width % (2 * options.heads):
        parser.error(f"--width {options.width} is no multiple of twice --heads {options.heads}")
    return options


def read_text(files: list[Path] | None) -> bytes:
    """The files' bytes; by default, the standard library's top-level modules up to MAX_BYTES."""
    if files:
        return b"".join(file.read_bytes() for file in files)
    library = Path(sysconfig.get_path("stdlib"))
    return b"".join(file.read_bytes() for file in sorted(library.glob("*.py")))[:MAX_BYTES]


def windows(text: bytes, context: int) -> Any:
    """Stretches of ``context + 1`` bytes, each beginning where the one before ends."""
    data = np.frombuffer(text, np.uint8)
    count = max(0, (len(data) - 1) // context)
    if not count:
        raise SystemExit(f"{len(data)} bytes are too little text for windows of {context} bytes.")
    return np.stack([data[at * context : (at + 1) * context + 1] for at in range(count)])


def init_params(key: Any, layers: int, width: int) -> Any:
    """The blocks' parameters lie behind one another, for ``jax.lax.scan``."""
    shapes = {"qkv": (width, 3 * width), "project": (width, width)}
    shapes |= {"up": (width, 4 * width), "down": (4 * width, width)}
    keys = dict(zip([*shapes, "embed"], jax.random.split(key, 5), strict=True))
    blocks = {}
    for name, shape in shapes.items():
        # Each block adds to its input twice: smaller steps for more blocks.
        scale = 0.02 / np.sqrt(2 * layers if name in ("project", "down") else 1)
        blocks[name] = scale * jax.random.normal(keys[name], (layers, *shape))
        blocks[f"{name}_bias"] = jnp.zeros((layers, shape[1]))
    for name in ("norm_1", "norm_2"):
        blocks[name] = jnp.ones((layers, width))
    embed = 0.02 * jax.random.normal(keys["embed"], (256, width))
    return {"blocks": blocks, "norm": jnp.ones(width), "embed": embed}


def normed(x: Any, scale: Any) -> Any:
    x = x - x.mean(-1, keepdims=True)
    return scale * x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def rotated(x: Any, angles: Any) -> Any:
    """Turn pairs of coordinates by the position's angles (rotary embedding, arXiv 2104.09864)."""
    a, b = jnp.split(x, 2, axis=-1)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate((a * cosine - b * sine, a * sine + b * cosine), -1)


def guesses(params: Any, tokens: Any, heads: int) -> Any:
    """From bytes to the logarithms of what comes next."""
    x = params["embed"][tokens]
    batch, length, width = x.shape
    frequencies = 10_000.0 ** -jnp.linspace(0, 1, width // heads // 2, endpoint=False)
    angles = (jnp.arange(length)[:, None] * frequencies)[:, None, :]

    def block(x: Any, p: Any) -> tuple[Any, None]:
        parts = normed(x, p["norm_1"]) @ p["qkv"] + p["qkv_bias"]
        query, key, value = jnp.split(parts.reshape(batch, length, heads, -1), 3, axis=-1)
        query, key = rotated(query, angles), rotated(key, angles)
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + seen.reshape(batch, length, width) @ p["project"] + p["project_bias"]
        up = jax.nn.gelu(normed(x, p["norm_2"]) @ p["up"] + p["up_bias"])
        return x + up @ p["down"] + p["down_bias"], None

    x, _ = jax.lax.scan(block, x, params["blocks"])
    return jax.nn.log_softmax(normed(x, params["norm"]) @ params["embed"].T)


def loss_of(params: Any, batch: mj.Batch, heads: int) -> Any:
    """How badly each byte is guessed from those before it, in nats."""
    text = batch.rows.astype(np.int32)
    logs = guesses(params, text[:, :-1], heads)
    return -jnp.take_along_axis(logs, text[:, 1:, None], -1).mean()


def rows_of(params: Any, batch: mj.Batch) -> Any:
    return batch.weight


def main() -> None:
    options = parse()
    world = mj.init()
    # Rank 0 reads: nodes may have different Pythons, and thus different texts.
    text = world.broadcast_object(read_text(options.text) if world.rank == 0 else None)
    cut = len(text) - len(text) // 20
    training, held_out = (windows(part, options.context) for part in (text[:cut], text[cut:]))
    params = init_params(jax.random.key(options.seed), options.layers, options.width)
    warm_up = max(1, options.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(
        options.lr / warm_up, options.lr, warm_up, max(options.steps, warm_up + 1), options.lr / 10
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1)
    )
    if options.zero:
        optimizer = mj.zero(optimizer)
    loss_fn = partial(loss_of, heads=options.heads)
    average = mj.value_and_grad(loss_fn, weight=rows_of)

    def step(params: Any, state: Any, batch: mj.Batch) -> Any:
        loss, gradients = average(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    compiled = jax.jit(step, donate_argnums=(0, 1))
    state = optimizer.init(params)
    data = mj.shard(training, options.batch_size, seed=options.seed)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    done = 0
    with Reporter(options, world) as report:
        report.say(f"{count:,} parameters, {len(text):,} bytes of text, {world.size} ranks")
        report.say(f"optimizer state of rank 0: {kept / 2**20:.1f} MiB")
        report.begin(0)
        while done < options.steps:
            for batch, _ in zip(data, range(options.steps - done), strict=False):
                params, state, loss = compiled(params, state, batch)
                report.step(float(loss), options.batch_size * options.context * world.size)
                done += 1

    total = weight = 0.0
    evaluate = jax.jit(loss_fn)
    for batch in mj.shard(held_out, options.batch_size, shuffle=False):
        total += float(evaluate(params, batch)) * float(batch.weight)
        weight += float(batch.weight)
    sums = mj.allreduce(jnp.array([total, weight]))
    loss = float(sums[0] / sums[1])
    verdict = "reached" if loss < TARGET else "not reached"
    report.say(
        f"held-out loss {loss:.4f} nats a byte; "
        f"the default options' target, below {TARGET}, is {verdict}"
    )
    report.finish(held_out_loss=loss, target=TARGET, reached=loss < TARGET)


if __name__ == "__main__":
    main()

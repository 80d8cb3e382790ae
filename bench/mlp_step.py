"""A training step where the framework is all there is: an MLP 64-128-10, batch 64, Adam.

    python bench/mlp_step.py --threads 1 2 --json mlp.json

tilewright compiled and eager, torch eager, JAX jitted and NumPy by hand, whichever is installed.
All start from the same weights and see the same batches. First the answers: 100 steps each, whose
losses must agree. Then the times, interleaved in rounds, of which minimum and median are given. A
step ends with its loss in memory, not in Python.

JAX has no switch for threads on the CPU: it uses as many as the process may.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import tilewright as tw
from tilewright.bench import engines, measure
from tilewright.bench.peers import Peers

BATCH, SIZES = 64, (64, 128, 10)
LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8
CHECKED, ROUNDS, STEPS = 100, 60, 20  # steps of the check; rounds, and steps in each
LOSSES_AGREE = 1e-4  # after 100 steps; float32 rounding alone


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[tw.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        result = compare(options.threads[0], options.rounds)
        print(report(result), flush=True)
        options.json.write_text(json.dumps(result))
        return 0
    print(engines.machine())
    results = [run_child(threads, options.rounds) for threads in options.threads]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def run_child(threads, rounds):
    """A process of its own: thread counts are fixed when torch is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--child", "--json", str(file)]
        command += ["--threads", str(threads), "--rounds", str(rounds)]
        env = engines.child_environment(engines.best_level(), threads, os.environ)
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        subprocess.run(command, env=env, check=True)
        return json.loads(file.read_text())


def compare(threads, rounds):
    """Check the answers, then time the engines in turns."""
    tw.set_num_threads(threads)
    torch = engines.load_torch(threads)
    rng = np.random.default_rng(0)
    weights = [
        (rng.uniform(-1, 1, (n, m)) / np.sqrt(m)).astype(np.float32)
        for m, n in itertools.pairwise(SIZES)
    ]
    batches = [
        (rng.standard_normal((BATCH, SIZES[0]), np.float32), rng.integers(0, SIZES[-1], BATCH))
        for _ in range(STEPS)
    ]
    step = {
        "tilewright compiled": our_step(weights, compiled=True),
        "tilewright eager": our_step(weights, compiled=False),
        "NumPy by hand": numpy_step(weights),
    }
    if torch is not None:
        step["torch eager"] = torch_step(torch, weights)
    if (jitted := jax_step(weights)) is not None:
        step["JAX jitted"] = jitted
    losses = {
        name: [float(run(*batches[i % STEPS])) for i in range(CHECKED)]
        for name, run in step.items()
    }
    check(losses)
    seconds = {name: [] for name in step}
    for index in range(rounds):
        for name in sorted(step, reverse=bool(index % 2)):
            run = step[name]
            start = time.perf_counter()
            for x, y in batches:
                run(x, y)
            seconds[name].append((time.perf_counter() - start) / STEPS)
    return {
        "threads": threads,
        "engines": engines.describe(Peers(torch)),
        "seconds": {name: measure.summarize(s)._asdict() for name, s in seconds.items()},
        "final_loss": {name: curve[-1] for name, curve in losses.items()},
    }


def check(losses):
    """Refuse to time what computes something else."""
    right = np.array(losses["NumPy by hand"])
    for name, curve in losses.items():
        gap = np.abs(np.array(curve) - right).max()
        if not gap <= LOSSES_AGREE:
            raise SystemExit(f"mlp_step: the losses of {name} differ from NumPy's by {gap:.2g}")
    if losses["tilewright compiled"] != losses["tilewright eager"]:
        raise SystemExit("mlp_step: the compiled step has not the bits of the eager one")


def our_step(weights, compiled):
    first, second = (tw.tensor(w, requires_grad=True) for w in weights)
    bias1, bias2 = (tw.tensor(np.zeros(len(w), np.float32), requires_grad=True) for w in weights)
    optimizer = tw.optim.Adam([first, bias1, second, bias2], LR, (BETA1, BETA2), EPS)

    def step(x, y):
        optimizer.zero_grad()
        hidden = tw.matmul(x, first.T, bias=bias1, activation="relu")
        loss = tw.cross_entropy(tw.matmul(hidden, second.T, bias=bias2), y)
        loss.backward()
        optimizer.step()
        return loss

    return tw.compile(step) if compiled else step


def torch_step(torch, weights):
    first, second = (torch.nn.Parameter(torch.from_numpy(w.copy())) for w in weights)
    bias1, bias2 = (torch.nn.Parameter(torch.zeros(len(w))) for w in weights)
    optimizer = torch.optim.Adam([first, bias1, second, bias2], LR, (BETA1, BETA2), EPS)
    functional = torch.nn.functional

    def step(x, y):
        optimizer.zero_grad(set_to_none=True)
        hidden = functional.relu(functional.linear(torch.from_numpy(x), first, bias1))
        loss = functional.cross_entropy(
            functional.linear(hidden, second, bias2), torch.from_numpy(y)
        )
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def jax_step(weights):
    """The step as one jitted function that owns its state, or None where there is no JAX."""
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return None
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")

    def loss_of(params, x, y):
        first, bias1, second, bias2 = params
        logits = jax.nn.relu(x @ first.T + bias1) @ second.T + bias2
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    def update(params, m, v, t, x, y):
        loss, grads = jax.value_and_grad(loss_of)(params, x, y)
        t = t + 1
        m = [BETA1 * a + (1 - BETA1) * g for a, g in zip(m, grads, strict=True)]
        v = [BETA2 * a + (1 - BETA2) * g * g for a, g in zip(v, grads, strict=True)]
        rate, root = LR / (1 - BETA1**t), jnp.sqrt(1 - BETA2**t)
        params = [
            p - rate * a / (jnp.sqrt(b) / root + EPS) for p, a, b in zip(params, m, v, strict=True)
        ]
        return params, m, v, t, loss

    jitted = jax.jit(update, donate_argnums=(0, 1, 2, 3))
    params = [jnp.asarray(a) for w in weights for a in (w, np.zeros(len(w), np.float32))]
    state = [params, *([jnp.zeros_like(p) for p in params] for _ in range(2)), jnp.float32(0)]

    def step(x, y):
        *state[:], loss = jitted(*state, x, y)
        return loss.block_until_ready()

    return step


def numpy_step(weights):
    """The same, written out, in place where NumPy can."""
    first, second = (w.copy() for w in weights)
    bias1, bias2 = (np.zeros(len(w), np.float32) for w in weights)
    params = [first, bias1, second, bias2]
    m, v = ([np.zeros_like(p) for p in params] for _ in range(2))
    steps, rows = [0], np.arange(BATCH)

    def step(x, y):
        steps[0] += 1
        hidden = np.maximum(x @ first.T + bias1, 0)
        logits = hidden @ second.T + bias2
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits)
        total = p.sum(1, keepdims=True)
        loss = (np.log(total[:, 0]) - logits[rows, y]).mean()
        p /= total
        p[rows, y] -= 1
        p /= BATCH
        back = (p @ second) * (hidden > 0)
        grads = [back.T @ x, back.sum(0), p.T @ hidden, p.sum(0)]
        rate = np.float32(LR / (1 - BETA1 ** steps[0]))
        root = np.float32(np.sqrt(1 - BETA2 ** steps[0]))
        for w, g, a, b in zip(params, grads, m, v, strict=True):
            a *= np.float32(BETA1)
            a += np.float32(1 - BETA1) * g
            b *= np.float32(BETA2)
            b += np.float32(1 - BETA2) * g * g
            w -= rate * a / (np.sqrt(b) / root + np.float32(EPS))
        return loss

    return step


def report(result) -> str:
    ours = result["seconds"]["tilewright compiled"]
    lines = [f"\nMLP {'-'.join(map(str, SIZES))}, batch {BATCH}, threads {result['threads']}"]
    for name, s in sorted(result["seconds"].items(), key=lambda item: item[1]["min"]):
        lines.append(
            f"  {name:20} {s['min'] * 1e6:7.1f} us (median {s['median'] * 1e6:7.1f})   "
            f"{s['min'] / ours['min']:5.2f} x ours   loss {result['final_loss'][name]:.6f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

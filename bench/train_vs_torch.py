"""One training step of a GPT: tilewright against torch eager.

    python bench/train_vs_torch.py --model demo nanogpt --threads 1 2 --json train.json
    python bench/train_vs_torch.py --model nanogpt --bf16

Both start from the same weights and see the same batches of real text (the standard library's own
source). Step times are interleaved: each step is done by one engine, then by the other, in turns,
each after the other's threads have gone to sleep. The torch model is plain eager code with
F.scaled_dot_product_attention and fused AdamW; --unfused takes torch's default AdamW. Our step is
compiled (tw.compile), --eager: it is not. With --bf16
torch runs under its bfloat16 autocast, and we cast at the same places: products and attention are
bfloat16, weights, their gradients, norms, the residual stream and the loss float32.
"""

from __future__ import annotations

import argparse
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
from tilewright.nn.attention import self_attention
from tilewright.training import batches, corpus

MODELS = {
    "demo": {"batch": 16, "steps": 60},  # GPTConfig's defaults, what `tilewright demo` trains
    "nanogpt": {"batch": 16, "steps": 14, "layers": 6, "heads": 6, "width": 384, "context": 256},
}
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
WARM_UP = 3  # steps that are not timed
ENGINES = ("tilewright", "torch")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", nargs="+", type=int, default=[tw.get_num_threads()])
    parser.add_argument("--isa", nargs="+", default=[engines.best_level()])
    parser.add_argument("--steps", type=int, help="instead of the model's own number")
    parser.add_argument("--unfused", action="store_true", help="torch's default AdamW")
    parser.add_argument(
        "--bf16", action="store_true", help="torch's autocast, and the same of ours"
    )
    parser.add_argument("--eager", action="store_true", help="our step without tw.compile")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        result = train(options)
        print(report(result), flush=True)
        options.json.write_text(json.dumps(result))
        return 0
    print(engines.machine())
    results = [
        run_child(options, model, isa, threads)
        for isa in options.isa
        for threads in options.threads
        for model in options.model
    ]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def run_child(options, model, isa, threads):
    """A process of its own: thread counts and instruction sets are fixed when torch is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--child", "--json", str(file), "--model", model]
        command += ["--threads", str(threads), "--isa", isa]
        command += ["--steps", str(options.steps)] if options.steps else []
        command += ["--unfused"] if options.unfused else []
        command += ["--bf16"] if options.bf16 else []
        command += ["--eager"] if options.eager else []
        env = engines.child_environment(isa, threads, os.environ)
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        subprocess.run(command, env=env, check=True)
        return json.loads(file.read_text())


def train(options):
    """Train both, step by step."""
    torch = engines.load_torch(options.threads[0])
    if torch is None:
        raise SystemExit("train_vs_torch needs torch: pip install torch")
    tw.set_num_threads(options.threads[0])
    setting = dict(MODELS[options.model[0]])
    batch, steps = setting.pop("batch"), options.steps or setting.pop("steps")
    setting.pop("steps", None)
    config = tw.models.GPTConfig(**setting)
    ours = tw.models.GPT(config, seed=1)
    weights = {name: np.array(p.data) for name, p in ours.named_parameters()}
    step = {
        "tilewright": our_step(ours, options.bf16, compiled=not options.eager),
        "torch": torch_step(torch, config, weights, not options.unfused, options.bf16),
    }
    data = batches.Batches(
        corpus.join(corpus.standard_library()), context=config.context, batch=batch, seed=1
    )
    seconds = {engine: [] for engine in ENGINES}
    losses = {engine: [] for engine in ENGINES}
    for index in range(WARM_UP + steps):
        ids, targets = data.at(index)
        for engine in ENGINES if index % 2 else ENGINES[::-1]:
            measure.wait_until_quiet()
            start = time.perf_counter()
            loss = step[engine](ids, targets)
            taken = time.perf_counter() - start
            losses[engine].append(loss)
            if index >= WARM_UP:
                seconds[engine].append(taken)
    return {
        "model": options.model[0] + ", bf16" * options.bf16,
        "isa": options.isa[0],
        "threads": options.threads[0],
        "parameters": sum(w.size for w in weights.values()),
        "tokens": batch * config.context,
        "engines": engines.describe(Peers(torch)),
        "seconds": {e: measure.summarize(s)._asdict() for e, s in seconds.items()},
        "losses": losses,
    }


def our_step(model, bf16, compiled):
    optimizer = tw.optim.AdamW(model.parameters(), **ADAMW)
    positions = np.arange(model.config.context)

    def step(ids, targets):
        optimizer.zero_grad()
        loss = bf16_loss(model, ids, targets, positions) if bf16 else model.loss(ids, targets)
        loss.backward()
        optimizer.step()
        return loss

    run = tw.compile(step) if compiled else step
    return lambda ids, targets: float(run(ids, targets))


def bf16_loss(model, ids, targets, positions):
    """The model's loss with bfloat16 products."""

    def linear(layer, x, activation=None):
        weight = layer.weight.to("bfloat16")
        return tw.matmul(x.to("bfloat16"), weight.T, bias=layer.bias, activation=activation)

    x = model.token(ids)
    s = model.position(np.broadcast_to(positions[: ids.shape[1]], ids.shape))
    for block in model.blocks:
        h, s = block.ln1(x, residual=s)
        h = self_attention(linear(block.qkv, h), block.heads, causal=True)
        h, s = block.ln2(linear(block.proj, h).to("float32"), residual=s)
        x = linear(block.down, linear(block.up, h, "gelu_tanh")).to("float32")
    h = model.ln(x, residual=s)[0].to("bfloat16")
    return tw.cross_entropy(tw.matmul(h, model.token.weight.to("bfloat16").T), targets)


def torch_step(torch, config, weights, fused, bf16):
    """The same model in plain torch, over the same parameter names."""
    p = {name: torch.nn.Parameter(torch.from_numpy(w.copy())) for name, w in weights.items()}
    optimizer = torch.optim.AdamW(p.values(), fused=fused, **ADAMW)

    def step(ids, targets):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = torch_logits(torch, p, config, torch.from_numpy(ids))
            flat = torch.from_numpy(targets).reshape(-1)
            loss = torch.nn.functional.cross_entropy(logits.reshape(len(flat), -1), flat)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def torch_logits(torch, p, config, ids):
    functional = torch.nn.functional
    linear = functional.linear

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    batch, length = ids.shape
    x = functional.embedding(ids, p["token.weight"]) + p["position.weight"][:length]
    for i in range(config.layers):
        b = f"blocks.{i}"
        h = linear(norm(x, f"{b}.ln1"), p[f"{b}.qkv.weight"], p[f"{b}.qkv.bias"])
        q, k, v = h.view(batch, length, 3, config.heads, -1).permute(2, 0, 3, 1, 4)
        a = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        a = a.transpose(1, 2).reshape(batch, length, config.width)
        x = x + linear(a, p[f"{b}.proj.weight"], p[f"{b}.proj.bias"])
        h = linear(norm(x, f"{b}.ln2"), p[f"{b}.up.weight"], p[f"{b}.up.bias"])
        h = functional.gelu(h, approximate="tanh")
        x = x + linear(h, p[f"{b}.down.weight"], p[f"{b}.down.bias"])
    return linear(norm(x, "ln"), p["token.weight"])


def report(result) -> str:
    ours, theirs = (result["seconds"][engine] for engine in ENGINES)
    best, median = (theirs[key] / ours[key] for key in ("min", "median"))
    curves = [np.array(result["losses"][engine]) for engine in ENGINES]
    shown = sorted({*range(0, len(curves[0]), max(1, len(curves[0]) // 6)), len(curves[0]) - 1})
    lines = [
        f"\n{result['model']}: {result['parameters']:,} parameters, "
        f"{result['tokens']} tokens a step, {result['isa']}, threads {result['threads']}",
        *(f"  {name:13}{text}" for name, text in result["engines"].items()),
        f"  step ms       tilewright {ours['min'] * 1e3:.1f} (median {ours['median'] * 1e3:.1f})   "
        f"torch {theirs['min'] * 1e3:.1f} (median {theirs['median'] * 1e3:.1f})   "
        f"×torch {best:.2f} (medians {median:.2f})",
        "  step          " + " ".join(f"{i:8d}" for i in shown),
    ]
    lines += [
        f"  {engine:13} " + " ".join(f"{curve[i]:8.4f}" for i in shown)
        for engine, curve in zip(ENGINES, curves, strict=True)
    ]
    gap = np.abs(curves[0] - curves[1])
    lines.append(f"  losses differ by at most {gap.max():.2g}, at step {int(gap.argmax())}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())

"""What the tests of tw.compile share."""

from __future__ import annotations

import numpy as np

import harness
import tilewright as tw

f32 = np.float32


def counts():
    """(recordings, recordings again, replays) so far."""
    calls = tw.stats().calls.get("program", {})
    kinds = ("record", "record again", "replay")
    return np.array(
        [sum(n for k, n in calls.items() if k.partition("@")[0] == kind) for kind in kinds]
    )


class Classifier:
    """The MLP 64-128-10 and its training step, twice alike for one seed."""

    def __init__(self, optimizer=tw.optim.Adam, **options):
        tw.manual_seed(5)
        self.model = tw.nn.Sequential(
            tw.nn.Linear(64, 128), tw.nn.ReLU(), tw.nn.Linear(128, 10)
        ).train()
        self.optimizer = optimizer(list(self.model.parameters()), **{"lr": 1e-2, **options})

    def step(self, x, y):
        self.optimizer.zero_grad()
        loss = tw.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return loss

    def state(self):
        own = [(p.data, p.grad) for p in self.model.parameters()]
        saved = self.optimizer.state_dict()
        return [np.array(a) for pair in own for a in pair] + [saved[k] for k in sorted(saved)]


def batch(i, rows=64):
    rng = np.random.default_rng(i)
    return rng.standard_normal((rows, 64), f32), rng.integers(0, 10, rows)


def same(a, b):
    return all(harness.same_bits(x, y) for x, y in zip(a, b, strict=True))

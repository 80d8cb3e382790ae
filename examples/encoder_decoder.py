"""An encoder and a decoder that learn to write a sequence backwards.

    python examples/encoder_decoder.py

Sequences have different lengths, so that batches are padded and every mask is in use: the encoder
ignores padding, the decoder does not look ahead, and ignores padding in what it reads of the
encoder. After some ten seconds, nearly all unseen sequences come out right.
"""

from __future__ import annotations

import argparse

import numpy as np

import tilewright as tw
from tilewright import nn, optim

PAD, BEGIN, END, FIRST = 0, 1, 2, 3  # tokens; those from FIRST on are the sequence's own
TOKENS = FIRST + 10
LONGEST = 9


def batch(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences, what the decoder reads, and what it should say: (size, T) ids, padded."""
    source = np.full((size, LONGEST), PAD)
    reads, says = np.full((2, size, LONGEST + 1), PAD)
    for i, length in enumerate(rng.integers(1, LONGEST + 1, size)):
        sequence = rng.integers(FIRST, TOKENS, length)
        source[i, :length] = sequence
        reads[i, : length + 1] = [BEGIN, *sequence[::-1]]
        says[i, : length + 1] = [*sequence[::-1], END]
    return source, reads, says


class Reverser(nn.Module):
    """Embeddings with positions, a Transformer, and logits over the tokens."""

    def __init__(self, width: int = 48, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width, padding_idx=PAD)
        self.position = nn.SinusoidalPositionalEncoding(width, batch_first=True)
        self.transformer = nn.Transformer(
            width, heads, layers, layers, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(width, TOKENS)

    def encode(self, source: np.ndarray) -> tw.Tensor:
        """What the decoder attends to: (B, S, width)."""
        x = self.position(self.embedding(source))
        return self.transformer.encoder(x, src_key_padding_mask=source == PAD)

    def decode(self, reads: np.ndarray, memory: tw.Tensor, source: np.ndarray) -> tw.Tensor:
        """Logits (B, T, TOKENS) of the token after each that was read."""
        y = self.position(self.embedding(reads))
        y = self.transformer.decoder(
            y, memory, tgt_is_causal=True, memory_key_padding_mask=source == PAD
        )
        return self.head(y)

    def forward(self, source: np.ndarray, reads: np.ndarray) -> tw.Tensor:
        """Logits of a whole batch, as training wants them."""
        return self.decode(reads, self.encode(source), source)

    def write(self, source: np.ndarray) -> np.ndarray:
        """The likeliest token, one after the other: (B, LONGEST + 1) ids, padded after END."""
        ids = np.full((len(source), 1), BEGIN)
        done = np.zeros(len(source), bool)
        with tw.no_grad():
            memory = self.encode(source)
            for _ in range(LONGEST + 1):
                logits = self.decode(ids, memory, source)[:, -1].numpy()
                token = np.where(done, PAD, logits.argmax(-1))
                ids = np.concatenate([ids, token[:, None]], axis=1)
                done |= token == END
        return ids[:, 1:]


def train(model: Reverser, steps: int, seed: int = 0, report: int = 100) -> list[float]:
    """Train on fresh batches; return the losses."""
    rng = np.random.default_rng(seed)
    criterion = nn.CrossEntropyLoss(ignore_index=PAD)
    optimizer = optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = optim.SequentialLR(
        optimizer,
        [
            optim.LinearLR(optimizer, 0.1, 1.0, steps // 10),
            optim.CosineAnnealingLR(optimizer, max(1, steps - steps // 10)),
        ],
        milestones=[steps // 10],
    )
    losses = []
    model.train()
    for step in range(steps):
        source, reads, says = batch(rng, 64)
        logits = model(source, reads)
        loss = criterion(logits.transpose(1, 2), says)  # classes are on axis 1
        optimizer.zero_grad()
        loss.backward()
        optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if report and (step + 1) % report == 0:
            print(f"step {step + 1:4d}   loss {np.mean(losses[-report:]):.4f}")
    return losses


def accuracy(model: Reverser, count: int = 500, seed: int = 1) -> float:
    """The share of unseen sequences that are written backwards without a mistake."""
    source, _, says = batch(np.random.default_rng([seed, 99]), count)
    model.eval()
    return float((model.write(source) == says).all(axis=1).mean())


def main() -> None:
    """Train, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tw.manual_seed(options.seed)
    model = Reverser()
    train(model, options.steps, options.seed)
    print(f"right on {accuracy(model):.1%} of 500 unseen sequences; three of them:")
    source, _, _ = batch(np.random.default_rng(5), 3)
    for given, written in zip(source, model.write(source), strict=True):
        words = (
            " ".join(str(t - FIRST) for t in ids if t not in (PAD, END)) for ids in (given, written)
        )
        print("  {}  ->  {}".format(*words))


if __name__ == "__main__":
    main()

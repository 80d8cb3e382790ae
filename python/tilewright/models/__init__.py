"""Whole models: GPT, and ``load`` for what they save."""

from tilewright.models.gpt import GPT, GPTConfig, load

__all__ = ["GPT", "GPTConfig", "load"]

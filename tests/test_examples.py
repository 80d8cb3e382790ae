"""The programs in examples/ do what they say."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

import tilewright as tw

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def example(request, monkeypatch):
    """A program as a module."""
    path = EXAMPLES / f"{request.param}.py"
    spec = importlib.util.spec_from_file_location(request.param, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, request.param, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("example", ["encoder_decoder"], indirect=True)
def test_encoder_decoder_learns_to_reverse(example):
    tw.manual_seed(0)
    model = example.Reverser()
    assert example.accuracy(model, 100) == 0.0
    losses = example.train(model, 250, report=0)
    assert losses[0] > np.log(example.TOKENS) - 0.5
    assert np.mean(losses[-20:]) < 0.2
    assert example.accuracy(model, 200) > 0.7


@pytest.mark.parametrize("example", ["encoder_decoder"], indirect=True)
def test_encoder_decoder_runs(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["encoder_decoder", "--steps", "20"])
    example.main()
    shown = capsys.readouterr().out
    assert "of 500 unseen sequences" in shown
    assert shown.count("->") == 3

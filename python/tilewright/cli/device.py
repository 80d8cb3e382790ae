"""``--device``, of the commands that run a model."""

from __future__ import annotations

import argparse


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare the option; where there is no such device, the model that goes there says so."""
    parser.add_argument(
        "--device",
        type=_device,
        default="cpu",
        metavar="NAME",
        help="cpu, or cuda for a GPU (default cpu)",
    )


def _device(name: str) -> str:
    from tilewright.device import is_device_name

    if not is_device_name(name):  # Module.to would take a dtype as well
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {name}")
    return name

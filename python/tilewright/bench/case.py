"""A row of the table: what is called, what it must answer, what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tilewright.bench.peers import Call, Peers
from tilewright.registry import Cost


@dataclass
class Case:
    """One row of the table."""

    op: str
    shape: str
    calls: Mapping[str, Call]  # engine -> call; "tilewright" is ours, "f32" our float32 product
    want: Callable[[], list[Any]]
    cost: Cost
    dtype: str = "float32"
    integer: bool = False  # the roof is that of int8 multiply-adds
    loose: tuple[
        str, ...
    ] = ()  # engines that answer another question (float32 beside int8): timed, not compared
    tolerance: float | None = None  # of the answers, where the dtype's own does not fit


@dataclass(frozen=True)
class Plan:
    """A case to be: its name, and how to make it with the peers that are there."""

    op: str
    shape: str
    build: Callable[[Peers], Case] = field(repr=False)
    targets: tuple[str, ...] = ()  # of targets.py
    full: bool = False  # only with --full

"""Rows that the registry makes: an op has one without a line about it here or beside.

The arguments are those of one of the op's case strings, the answer is its float64 ``reference``,
operations and bytes are its ``cost``. Which cases: what the op's own ``bench`` lists, else SHAPES,
else the largest of its ``cases``. PEERS says how others compute it, where that is simple.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np

import tilewright
from tilewright.bench.case import Case, Plan
from tilewright.bench.peers import Call, Peers
from tilewright.registry import OPS, Op

tw: Any = tilewright  # as in products.py

# op -> name in the table, case. Those of ops with rows beside show their options.
SHAPES: dict[str, dict[str, str]] = {
    "relu": {"512x3072": "512,3072"},
    "gelu_tanh": {"512x3072": "512,3072"},
    "silu": {"512x3072": "512,3072"},
    "embedding": {"4096 of 32000x768": "4096;32000,768"},
    "dequantize": {
        "4096x1024 int8": "4096,1024;0",
        "4096x1024 int4 g64": "4096,1024;0;4;g64",
    },
    "attention_varlen": {"8: 12x31..512x64": "12,12,64; 512,31,257,128,400,64,300,190; =; causal"},
    "attention": {
        "1x8x512x64 window": "1,8,8,512,512,64;window=128:0;causal",
        "1x8x512x64 softcap": "1,8,8,512,512,64;softcap=30;causal",
        "1x8x512x64 ALiBi": "1,8,8,512,512,64;alibi;causal",
        "1x8x512x64 dropout": "1,8,8,512,512,64;dropout=0.1",
    },
}
QUICK: dict[str, dict[str, str]] = {
    "embedding": {"40 of 64x48": "40;64,48"},
    "dequantize": {"16x48 int4 g16": "16,48;0;4;g16"},
    "attention_varlen": {"2x(33, 7)x16": "2,1,16; 33,7; =; causal"},
    "attention": {
        f"1x2x33x16 {name.split()[-1]}": case.replace("1,8,8,512,512,64", "1,2,2,33,33,16")
        for name, case in SHAPES["attention"].items()
    },
}

# torch, args, kwargs -> engine -> call; torch may be None
Others = Callable[[Any, tuple[Any, ...], dict[str, Any]], dict[str, Call]]


def plans(written: Collection[str], quick: bool = False) -> Iterator[Plan]:
    """The rows of every registered op that is not ``written`` by hand, and of all in SHAPES."""
    for op in OPS.values():
        own = getattr(op.definition, "bench", ())
        named = {case.replace(" ", ""): case for case in own}
        named = named or (QUICK if quick else SHAPES).get(op.name, {})
        if not named and op.name not in written:
            case = largest(op)
            named = {case.replace(" ", ""): case}
        for name, case in named.items():
            yield plan(op, name, case)


def plan(op: Op, name: str, case: str) -> Plan:
    """One case of an op as a row of the table."""

    def build(peers: Peers) -> Case:
        args, kwargs = _arguments(op, case)
        calls: dict[str, Call] = {"tilewright": lambda: op(*args, **kwargs)}
        if op.name in PEERS:
            calls |= PEERS[op.name](peers.torch, args, kwargs)
        assert op.cost is not None
        cost = op.cost(*args, **kwargs)
        integer = any(getattr(x, "dtype", None) == np.int8 for x in args)
        loose = ("torch",) if kwargs.get("dropout_p") else ()  # it drops other elements
        return Case(
            op.name, name, calls, lambda: answer(op, args, kwargs), cost, "float32", integer, loose
        )

    return Plan(op.name, name, build)


def largest(op: Op) -> str:
    """The case that moves the most bytes."""
    cost = op.cost
    assert cost is not None

    def moved(case: str) -> float:
        args, kwargs = _arguments(op, case)
        empty = any(getattr(x, "size", 1) == 0 for x in args)
        return 0.0 if empty else cost(*args, **kwargs).bytes

    return max(op.cases, key=moved)


def answer(op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What the reference says, in float64 from the same numbers."""
    assert op.reference is not None
    known = inspect.signature(op.reference).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in known.values())
    exact = {n: _wide(v) for n, v in kwargs.items() if free or n in known}
    with np.errstate(all="ignore"):
        found = op.reference(*map(_wide, args), **exact)
    many = found if type(found) is tuple else (found,)
    return [np.asarray(reference.value) for reference in many]


def _arguments(op: Op, case: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    assert op.make is not None
    return op.make(case, np.random.default_rng(0), np.dtype(np.float32))


def _wide(value: Any) -> Any:
    floats = isinstance(value, np.ndarray) and value.dtype.kind == "f"
    return value.astype(np.float64) if floats else value


def _elementwise(torch_call: Callable[[Any, Any], Any], numpy_call: Any = None) -> Others:
    def peers(torch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Call]:
        (x,) = args
        calls: dict[str, Call] = {}
        if numpy_call is not None:
            calls["numpy"] = lambda: numpy_call(x)
        if torch:
            t = torch.from_numpy(np.ascontiguousarray(x))  # it takes no negative strides
            calls["torch"] = lambda: torch_call(torch.nn.functional, t)
        return calls

    return peers


def _embedding(torch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Call]:
    ids, table = args
    calls: dict[str, Call] = {"numpy": lambda: table[ids]}
    if torch:
        t_ids, t_table = torch.from_numpy(ids), torch.from_numpy(table)
        calls["torch"] = lambda: torch.nn.functional.embedding(t_ids, t_table)
    return calls


def _dequantize(torch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Call]:
    (q,) = args
    if q.bits != 8 or q.axis != 0 or q.offset is not None or q.group_size is not None:
        return {}
    data, scale = q.data, q.scale[:, None]
    calls: dict[str, Call] = {"numpy": lambda: data * scale}
    if torch:
        t_data, t_scale = torch.from_numpy(data), torch.from_numpy(scale)
        calls["torch"] = lambda: t_data * t_scale
    return calls


def _attention(torch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Call]:
    """The fused call, with a window or ALiBi as the mask that it takes for them."""
    if not torch or "softcap" in kwargs:
        return {}
    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (torch.from_numpy(x) for x in args)
    options: dict[str, Any] = {}
    if "dropout_p" in kwargs:
        options["dropout_p"] = kwargs["dropout_p"]
    behind = np.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - np.arange(k.shape[2])
    if "window" in kwargs or "alibi_slopes" in kwargs:
        left = kwargs["window"][0] if "window" in kwargs else k.shape[2]
        mask = np.where((behind < 0) | (behind > left), -np.inf, 0).astype(np.float32)[None]
        if "alibi_slopes" in kwargs:
            mask = mask - kwargs["alibi_slopes"][:, None, None] * abs(behind).astype(np.float32)
        options["attn_mask"] = torch.from_numpy(mask)
    return {"torch": lambda: sdpa(q, k, v, **options)}


def _varlen(torch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Call]:
    """One fused call a sequence, the results joined."""
    if not torch:
        return {}
    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (torch.from_numpy(x).transpose(0, 1) for x in args[:3])
    ends = args[3].tolist()
    grouped = q.shape[0] != k.shape[0]

    def call() -> Any:
        parts = [
            sdpa(
                *(x[None, :, a:b] for x in (q, k, v)),
                is_causal=kwargs.get("causal", False),
                enable_gqa=grouped,
            )
            for a, b in itertools.pairwise(ends)
        ]
        return torch.cat(parts, 2)[0].transpose(0, 1)

    return {"torch": call}


PEERS: dict[str, Others] = {
    "relu": _elementwise(lambda f, t: f.relu(t), lambda x: np.maximum(x, 0)),
    "gelu_tanh": _elementwise(lambda f, t: f.gelu(t, approximate="tanh")),
    "silu": _elementwise(lambda f, t: f.silu(t)),
    "embedding": _embedding,
    "dequantize": _dequantize,
    "attention": _attention,
    "attention_varlen": _varlen,
}

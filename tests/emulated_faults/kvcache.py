"""Faults of kvcache.cu."""

from __future__ import annotations

from emulated_faults.fault import BOUNDS, Fault

CACHE = {"source": "kvcache.cu", "tests": ("emulated_kvcache",)}
PAGES, FORKS = "pages_have_the_bits", "forks_share_pages"

FAULTS = [
    Fault(
        "V is filled from k",
        "kvcache.cu",
        "const Array& x = value ? v : k;",
        "const Array& x = k;",
        PAGES,
        test=f"{PAGES} and 9-4 and float32",
        **CACHE,
    ),
    Fault(
        "the upper half of the lanes has no say in the scale",
        "kvcache.cu",
        "for (int d = 16; d; d /= 2) amax",
        "for (int d = 8; d; d /= 2) amax",
        PAGES,
        test=f"{PAGES} and 33-40 and int8",
        **CACHE,
    ),
    Fault(
        "a page that was shared loses the rows before",
        "kvcache.cu",
        "piece.shared ? warp : piece.first + warp",
        "piece.first + warp",
        FORKS,
        test=f"{FORKS} and float32",
        **CACHE,
    ),
    Fault(
        "a page that was shared loses their scales",
        "kvcache.cu",
        "if (lane() == 0) at.scale_of(to, row) = at.scale_of(from, row);",
        "",
        FORKS,
        test=f"{FORKS} and int8",
        **CACHE,
    ),
    Fault(
        "no bound for the warps of the last block",
        "kvcache.cu",
        "if (i >= 2 * rows) return;",
        "",
        BOUNDS,
        test="many_pages and int8",
        **CACHE,
    ),
    Fault(
        "the last launch writes past the table",
        "kvcache.cu",
        "if (i < count) to[i]",
        "to[i]",
        BOUNDS,
        test=f"{PAGES} and 9-4 and float32",
        **CACHE,
    ),
]

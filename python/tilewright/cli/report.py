"""``tilewright`` without a command: what was built, and what this machine has."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

import numpy as np

from tilewright import _core

_CPU = Path("/sys/devices/system/cpu")


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    print("\n".join(lines()))
    return 0


def lines() -> list[str]:
    """Return the report, a line per item."""
    build = _core.build_info()
    note = ", with AddressSanitizer" if build["sanitized"] else ""
    rows = [
        ("tilewright", f"{build['version']} ({build['build_type']} build{note})"),
        ("compiler", _compiler(str(build["compiler"]))),
        ("Python", f"{platform.python_version()}, NumPy {np.__version__}"),
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("CPU", f"{cpu_model()}, {_cores()}"),
        ("caches", _caches()),
        ("ISA levels", _levels()),
        ("threads", f"{_core.get_num_threads()}: {_why_threads()}"),
        ("GPU", _gpu()),
    ]
    out = [f"{name:<11}{value}" for name, value in rows]
    out.append("environment")
    width = max(len(name) for name, _, _ in _core.environment())
    out += [
        f"  {name:<{width}}  {value or '(unset)':<8}  {meaning}"
        for name, value, meaning in _core.environment()
    ]
    return out


def _gpu() -> str:
    from tilewright import cuda

    missing = cuda.lacks()
    return f"not used: {missing}" if missing else "CuPy's arrays run on it"


def _compiler(version: str) -> str:
    """GCC's own name for itself is a bare number."""
    return f"GCC {version}" if version[:1].isdigit() else version


def cpu_model() -> str:
    """Return the processor's name as the kernel tells it."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _cores() -> str:
    logical = os.cpu_count() or 1
    siblings = {_read(path) for path in _CPU.glob("cpu[0-9]*/topology/thread_siblings_list")} - {""}
    if siblings and len(siblings) != logical:
        return f"{len(siblings)} cores, {logical} threads"
    return f"{logical} cores" if logical > 1 else "1 core"


def _caches() -> str:
    """Caches of the first core, such as "L1d 32K, L2 1024K, L3 32768K"."""
    found = []
    for index in sorted((_CPU / "cpu0" / "cache").glob("index[0-9]*")):
        level, kind = _read(index / "level"), _read(index / "type")
        if kind != "Instruction":
            found.append(f"L{level}{'d' if kind == 'Data' else ''} {_read(index / 'size')}")
    return ", ".join(found) or "unknown"


def _levels() -> str:
    words = []
    for name, compiled, supported, active in _core.isa_levels():
        if active:
            state = "active"
        elif not compiled:
            state = "not in this build"
        else:
            state = "supported" if supported else "not supported by this CPU"
        words.append(f"{name} ({state})")
    return ", ".join(words)


def _why_threads() -> str:
    """What the default is the least of."""
    limits = [f"{source} {cores:g}" for source, cores in _core.thread_limits()]
    return "the least of: " + ", ".join(limits) if len(limits) > 1 else limits[0]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

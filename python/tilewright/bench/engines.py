"""The competitors: which are here, which ISA they run, and the environment that keeps it fair.

Every combination of ISA level and thread count runs in a process of its own, because OpenBLAS, MKL,
oneDNN and ATen read their environment once, when they are loaded.
"""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tilewright import _core

# Peers held to AVX2: the fair comparison for our avx2 level.
HELD = {
    "OPENBLAS_CORETYPE": "Haswell",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TILEWRIGHT_NUM_THREADS",
)
# Whatever else slows or pins a peer must not leak in from the caller's shell.
FOREIGN = (
    "OPENBLAS_VERBOSE",
    "MKL_DEBUG_CPU_TYPE",
    "OMP_WAIT_POLICY",
    "KMP_BLOCKTIME",
    "GOMP_SPINCOUNT",
)


def child_environment(isa: str, threads: int, parent: Mapping[str, str]) -> dict[str, str]:
    """The environment of the process that benches this ISA level with this many threads."""
    env = {k: v for k, v in parent.items() if k not in HELD and k not in FOREIGN}
    env.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    env["TILEWRIGHT_ISA"] = isa
    if isa == "avx2":
        env.update(HELD)
    return env


def load_torch(threads: int) -> Any:
    """Import torch with this many threads, or None."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    torch.set_num_threads(threads)
    return torch


def describe(torch: Any) -> dict[str, str]:
    """Engine → version and the ISA that it reports."""
    found = {
        "tilewright": f"{_core.build_info()['version']}, level "
        + next(name for name, _, _, active in _core.isa_levels() if active),
        "numpy": f"{np.__version__}, {_openblas()}",
    }
    if torch:
        found["torch"] = (
            f"{torch.__version__}, ATen {torch.backends.cpu.get_cpu_capability()}, "
            f"MKL {os.environ.get('MKL_ENABLE_INSTRUCTIONS', 'unlimited')}, "
            f"oneDNN {os.environ.get('ONEDNN_MAX_CPU_ISA', 'unlimited')}, "
            f"{torch.get_num_threads()} threads"
        )
    return found


def _openblas() -> str:
    try:
        threadpoolctl = importlib.import_module("threadpoolctl")
    except ImportError:
        return "BLAS kernel unknown (threadpoolctl is not installed)"
    for library in threadpoolctl.threadpool_info():
        if library["user_api"] == "blas" and "numpy" in library["filepath"]:
            name, kernel = library["internal_api"], library.get("architecture", "unknown")
            threads = library["num_threads"]
            return f"{name} {library.get('version')}, kernel {kernel}, {threads} threads"
    return "no BLAS found"


def machine() -> dict[str, Any]:
    """The table's header: CPU, cores, compiler, flags, commit, load."""
    build = _core.build_info()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "version": build["version"],
        "commit": _commit(),
        "compiler": build["compiler"],
        "build_type": build["build_type"],
        "flags": [line for line in build["flags"].split("|") if line],
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    text = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    names = {k.strip(): v.strip() for k, v in fields.items()}
    family = f"family {names['cpu family']} model {names['model']}" if "cpu family" in names else ""
    return f"{names.get('model name', platform.processor() or 'unknown')} {family}".strip()


def _commit() -> str:
    """The commit of a source checkout; "" for an installed wheel."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    inside = (here.parents[2] / "CMakeLists.txt").is_file()
    return done.stdout.strip() if done.returncode == 0 and inside else ""

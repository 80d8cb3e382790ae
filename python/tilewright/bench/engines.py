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

from tilewright import _core, runtime
from tilewright.bench.ort import Ort
from tilewright.bench.peers import Peers

# Levels below the machine's best hold the peers to the same instructions, as far as each has a
# name for them: OpenBLAS, MKL, oneDNN, ATen.
HOLDS = (
    "OPENBLAS_CORETYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
)
HELD = {
    "generic": ("Prescott", "SSE4_2", "SSE41", "default"),
    "avx2": ("Haswell", "AVX2", "AVX2", "avx2"),
    "avx512": ("SkylakeX", "AVX512", "AVX512_CORE", "avx512"),
    "avx512_vnni": ("SkylakeX", "AVX512_E1", "AVX512_CORE_VNNI", "avx512"),
    "avx512_bf16": ("Cooperlake", "AVX512_E3", "AVX512_CORE_BF16", "avx512"),
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
    env = {k: v for k, v in parent.items() if k not in HOLDS and k not in FOREIGN}
    env.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    env["TILEWRIGHT_ISA"] = isa
    env.update(zip(HOLDS, HELD.get(isa, ()), strict=False))
    return env


def load_torch(threads: int) -> Any:
    """Import torch with this many threads, or None."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    torch.set_num_threads(threads)
    return torch


def load_peers(isa: str, threads: int) -> tuple[Peers, dict[str, str]]:
    """The peers that are here, and why others are not: engine → reason."""
    absent = {}
    torch = load_torch(threads)
    if torch is None:
        absent["torch"] = "not installed"
    ort = None
    if isa in HELD and isa != best_level():
        absent["ort"] = f"ONNX Runtime has no setting that holds it to {isa}"
    else:
        try:
            ort = Ort(threads)
        except ImportError as error:
            absent["ort"] = f"{error.name or error} is not installed"
    return Peers(torch, ort), absent


def best_level() -> str:
    """The ISA level that this CPU runs by itself."""
    return next(level.name for level in reversed(runtime.isas()) if level.supported)


def describe(peers: Peers) -> dict[str, str]:
    """Engine → version and the ISA that it reports."""
    found = {
        "tilewright": f"{_core.build_info()['version']}, level {runtime.active_isa()}",
        "numpy": f"{np.__version__}, {_openblas()}",
    }
    if torch := peers.torch:
        found["torch"] = (
            f"{torch.__version__}, ATen {torch.backends.cpu.get_cpu_capability()}, "
            f"MKL {os.environ.get('MKL_ENABLE_INSTRUCTIONS', 'unlimited')}, "
            f"oneDNN {os.environ.get('ONEDNN_MAX_CPU_ISA', 'unlimited')}, "
            f"{torch.get_num_threads()} threads"
        )
        found["torch_packed"] = "its MKL and oneDNN with weights packed beforehand"
    if peers.ort:
        found["ort"] = f"ONNX Runtime {peers.ort.version}, bound in- and outputs, "
        found["ort"] += f"{peers.ort.threads} threads"
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

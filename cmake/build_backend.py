"""scikit-build-core's backend, which asks PyPI for nvcc where CUDA is wanted and there is none."""

import os
import shutil

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403

_NVCC = ["nvidia-cuda-" + part for part in ("nvcc", "crt", "runtime", "cccl")] + ["nvidia-nvvm"]


def _cuda(settings):
    """TILEWRIGHT_CUDA=ON pip install .  or  pip install . -C cmake.define.TILEWRIGHT_CUDA=ON."""
    name, env = "TILEWRIGHT_CUDA", os.environ
    wanted = (settings or {}).get(f"cmake.define.{name}", env.get(name, "")).upper() == "ON"
    homes = (env.get("CUDA_HOME"), env.get("CUDA_PATH"), "/usr/local/cuda")  # as cuda.cmake looks
    nvcc = shutil.which("nvcc") or any(h and shutil.which(f"{h}/bin/nvcc") for h in homes)
    return [f"{package}==13.0.*" for package in _NVCC] if wanted and not nvcc else []


def get_requires_for_build_wheel(config_settings=None):  # noqa: D103
    return _build.get_requires_for_build_wheel(config_settings) + _cuda(config_settings)


def get_requires_for_build_editable(config_settings=None):  # noqa: D103
    return _build.get_requires_for_build_editable(config_settings) + _cuda(config_settings)

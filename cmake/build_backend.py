"""scikit-build-core's backend, which asks PyPI for nvcc where CUDA is wanted and there is none.

TILEWRIGHT_CUDA=ON pip install .
"""

import os
import shutil

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403

_NVCC = [
    *("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl"),
    "nvidia-nvvm",
]


def _cuda():
    installed = shutil.which("nvcc") or {"CUDA_HOME", "CUDA_PATH"} & set(os.environ)
    wanted = os.environ.get("TILEWRIGHT_CUDA", "").upper() == "ON"
    return [f"{name}==13.0.*" for name in _NVCC] if wanted and not installed else []


def get_requires_for_build_wheel(config_settings=None):  # noqa: D103
    return _build.get_requires_for_build_wheel(config_settings) + _cuda()


def get_requires_for_build_editable(config_settings=None):  # noqa: D103
    return _build.get_requires_for_build_editable(config_settings) + _cuda()

"""Which compiled extension ``tilewright._core`` is: the one with CUDA where it was built and loads.

``_cuda`` has all that ``_core`` has, compiled from the same sources, and the kernels of a GPU
beside. Importing it needs no driver.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_NAME = "tilewright._core"


def _prefer_cuda() -> str:
    """Put ``_cuda`` in the place of ``_core``; return why not, or nothing."""
    if _NAME in sys.modules:  # another one was put there: tests do
        return ""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    path = Path(__file__).with_name(f"_cuda{suffix}")
    if not path.exists():
        return "this build has no CUDA"
    loader = importlib.machinery.ExtensionFileLoader(_NAME, str(path))
    spec = importlib.util.spec_from_loader(_NAME, loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        return f"the CUDA build of the extension does not load ({error})"
    sys.modules[_NAME] = module
    sys.modules["tilewright"]._core = module  # type: ignore[attr-defined]
    return ""


WHY_NOT_CUDA = _prefer_cuda()

"""Where the C++ library lies that was installed beside the Python package."""

from __future__ import annotations

from pathlib import Path

from tilewright import _core
from tilewright.errors import UnsupportedError


def get_include() -> str:
    """The folder to compile with: ``#include <tilewright/tilewright.h>``.

    Raises:
        UnsupportedError: this is a source tree, not an installed package.
    """
    return _installed("get_include", "include", "tilewright/tilewright.h")


def get_cmake_dir() -> str:
    """The folder of ``find_package(tilewright CONFIG)``: a prefix path, or ``tilewright_DIR``.

    The target ``tilewright::tilewright`` is a static library: link it with a compiler at least as
    new as the one that built it (``python -m tilewright`` says which).

    Raises:
        UnsupportedError: this is a source tree, not an installed package.
    """
    return _installed("get_cmake_dir", "lib/cmake/tilewright", "tilewrightConfig.cmake")


def _installed(name: str, folder: str, file: str) -> str:
    # Beside the extension module: an editable install keeps the Python files elsewhere.
    path = Path(_core.__file__).parent / folder
    if (path / file).is_file():
        return str(path)
    raise UnsupportedError(
        f"{name}: the C++ library must be installed beside the package, got a tree without "
        f"{path / file}; run `pip install .`, or `cmake --install BUILD --prefix DIR`"
    )

"""The code base about itself: layers, symbols, flags, sizes, and that every op is complete."""

from __future__ import annotations

import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import types

import pytest

import tilewright as tw
from tilewright import _core
from tilewright.registry import OPS

ROOT = pathlib.Path(__file__).resolve().parent.parent
LARGEST_FILE = 900  # lines; kernels aim at 400, others at 600
TEXT = {
    ".cc",
    ".h",
    ".cu",
    ".cuh",
    ".py",
    ".pyi",
    ".md",
    ".txt",
    ".toml",
    ".json",
    ".sh",
    ".cmake",
    "",
}


def tracked():
    """Files of the repository: what git knows, or everything in a source archive."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")
        return [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    folders = ("csrc", "python", "tests", "bench")
    return [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]


FILES = tracked()


def text_of(path):
    return path.read_text(encoding="utf-8")


def sources(*folders, suffixes=(".cc", ".h", ".cu", ".cuh")):
    return [
        p
        for p in FILES
        if p.suffix in suffixes and any(p.is_relative_to(ROOT / folder) for folder in folders)
    ]


def found_in(paths, pattern):
    """file:line of every match."""
    hits = []
    for path in paths:
        for number, line in enumerate(text_of(path).splitlines(), 1):
            if re.search(pattern, line):
                hits.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    return hits


# What the files of a layer may include, besides the C++ library; an arrow only ever points down.
MAY_INCLUDE = {
    "csrc/include": r"tilewright/",
    "csrc/core": r"(core|tilewright)/",
    "csrc/simd": r"(simd/|tilewright/|cpu/kernel_table\.h|cpu/kernels_\w+\.h)",
    "csrc/cpu": r"(core|cpu|tilewright)/",
    "csrc/ops": r"(core/|cpu/|ops/|tilewright/|cuda/(kernels|graph)\.h)",
    "csrc/emulator": r"(emulator|tilewright)/",
    "csrc/cuda": r"(core|cuda|emulator|tilewright)/",
    "csrc/python": r"(core|cpu|ops|python|tilewright|cuda/gpu|emulator)/",
}


@pytest.mark.parametrize("layer", MAY_INCLUDE)
def test_includes_point_down(layer):
    wrong = [
        hit
        for hit in found_in(sources(layer), r'^\s*#\s*include\s*"')
        if not re.search(rf'#\s*include\s*"{MAY_INCLUDE[layer]}', hit)
    ]
    assert not wrong, wrong


def test_simd_uses_no_standard_library():
    allowed = r"<(stdint|stddef|string|immintrin|arm_neon)\.h>"
    includes = found_in(sources("csrc/simd"), r"^\s*#\s*include\s*<")
    wrong = [hit for hit in includes if not re.search(allowed, hit)]
    wrong += found_in(sources("csrc/simd"), r"^[^/\"]*\bstd::")
    assert not wrong, wrong


# x86's and NEON's functions and types, and what they are made of in GCC; waiting is no arithmetic.
INTRINSICS = re.compile(
    r"\b_mm\d*_|\b__m(128|256|512)|\b__mmask|\b__builtin_(ia32_(?!pause)|aarch64_|neon_)"
    r"|\bv\w+_b?[fsup](8|16|32|64)\s*\(|\b(b?float|u?int|poly)\d+x\d+(x\d)?_t\b"
    r"|<(\w*intrin|arm_\w+)\.h>"
)


def may_use_intrinsics(path):
    return path.parent.name == "simd" and re.fullmatch(
        r"(vec|dot)_\w+\.h|tiles_emulated\.h", path.name
    )


def test_intrinsics_stay_where_they_belong():
    paths = sources("csrc", "tests/cpp")
    assert not found_in([p for p in paths if not may_use_intrinsics(p)], INTRINSICS)
    using = {p.name for p in paths if may_use_intrinsics(p) and INTRINSICS.search(text_of(p))}
    assert using >= {"vec_avx2.h", "vec_avx512.h", "vec_neon.h", "dot_s8.h"}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("v = _mm_add_ps(a, b);", True),
        ("v = _mm512_maskz_loadu_ps(mask, p);", True),
        ("__m256i v;", True),
        ("__mmask16 m = 1;", True),
        ("v = vfmaq_laneq_f32(c, a, b, 1);", True),
        ("vst1q_s8 (p, v);", True),
        ("v = vbfdotq_f32(c, a, b);", True),
        ("v = vcvt_bf16(a);", True),
        ("float32x4_t v;", True),
        ("uint8x16x2_t v;", True),
        ("v = __builtin_ia32_maxps(a, b);", True),
        ("#include <immintrin.h>", True),
        ("#include <arm_neon.h>", True),
        ("__builtin_ia32_pause();", False),
        ("v = __builtin_shuffle(a, b, order);", False),
        ("value_of(x), view_of(f32), vec_f32, to_float(widen(p))", False),
    ],
)
def test_what_counts_as_an_intrinsic(line, found):
    assert bool(INTRINSICS.search(line)) == found


def cuda_kernels():
    return [p for p in sources("csrc/cuda") if not p.is_relative_to(ROOT / "csrc/cuda/gpu")]


def test_cuda_kernels_use_the_gpu_layer():
    """What the emulator can't run: csrc/README.md says why."""
    beyond = (
        r"\basm\b|<<<|\b__shared__\b|cooperative_groups|nvcuda|mma\.h"
        r"|^\s*#\s*include\s*[<\"](cuda_runtime|emulator/|cuda/gpu/(?!gpu\.h|stream\.h|capture\.h))"
    )
    assert not found_in(cuda_kernels(), beyond)


def test_inline_assembly_has_its_places():
    places = {
        "csrc/cuda/gpu/ptx.h",
        "csrc/emulator/fibers.cc",
        "csrc/simd/tiles.h",
        "csrc/simd/vec_avx512.h",
    }
    others = [p for p in sources("csrc") if str(p.relative_to(ROOT)) not in places]
    assert not found_in(others, r"\basm\s*(volatile\s*)?\(")


def test_emulators_are_for_tests():
    """Off unless asked for, and refused in a wheel; of tiles as of CUDA."""
    text = text_of(ROOT / "CMakeLists.txt")
    for option in ("TILEWRIGHT_EMULATOR", "TILEWRIGHT_EMULATE_AMX"):
        assert re.search(rf"option\({option} .* OFF\)", text)
    assert re.search(r"if\(TILEWRIGHT_EMULATE_AMX AND SKBUILD\)\s+message\(FATAL_ERROR", text)
    text = text_of(ROOT / "cmake/emulator.cmake")
    assert re.search(r"if\(SKBUILD\)\s+message\(FATAL_ERROR", text)


def test_pybind11_only_in_the_binding():
    everywhere_else = [p for p in sources("csrc") if not p.is_relative_to(ROOT / "csrc/python")]
    assert not found_in(everywhere_else, r"pybind11|Python\.h")


def test_every_kernel_call_brings_its_context():
    """The GIL is released by KernelCall alone, which brings the options of tw.options along."""
    others = [p for p in sources("csrc/python") if p.name != "context.h"]
    assert not found_in(others, "gil_scoped_release")


def test_getenv_only_in_env():
    others = [p for p in sources("csrc") if p.name != "env.cc"]
    assert not found_in(others, r"\bgetenv\b(?! of)")


def test_the_library_never_prints_aborts_or_exits():
    calls = r"\b(printf|puts|abort|std::terminate|exit|_exit)\s*\("
    others = [p for p in sources("csrc") if p.name != "trace.cc"]
    assert not found_in(others, calls)
    assert not found_in(others, r"std::(cout|cerr)|\bassert\(")


def test_no_fast_math_and_no_tile_intrinsics():
    builds = [p for p in FILES if p.name.startswith("CMake") or p.suffix in (".toml", ".cmake")]
    flags = "-f" + "fast-math|-O" + "fast|associative-math"
    assert not found_in(builds, rf"^[^#]*({flags})")
    assert not found_in(sources("csrc"), rf'"({flags})"|pragma.*{flags}')
    assert not found_in(sources("csrc"), r"\b_tile_[a-z]+")


def test_no_paths_of_one_machine():
    folders = "|".join(("home", "root", "work", "Users", "tmp"))
    texts = [p for p in FILES if p.suffix in TEXT]
    hits = found_in(texts, rf"(?<![\w.~/*$}})-])/({folders})/\w")
    assert not hits, hits


def test_nothing_is_left_to_do():
    words = "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3))
    assert not found_in([p for p in FILES if p.suffix in TEXT], rf"\b({words})\b")


def test_file_sizes():
    texts = [p for p in FILES if p.suffix in TEXT and p.name != "LICENSE"]
    sizes = {str(p.relative_to(ROOT)): len(text_of(p).splitlines()) for p in texts}
    assert not {name: n for name, n in sizes.items() if n > LARGEST_FILE}


def test_torch_is_a_peer_never_a_need():
    package = [
        p
        for p in sources("python/tilewright", suffixes=(".py",))
        if "bench" not in p.relative_to(ROOT).parts
    ]
    assert not found_in(package, r"^\s*(import|from)\s+torch\b")


def flags_of_levels():
    """ISA level -> compiler flags, as CMakeLists.txt has them."""
    text = text_of(ROOT / "CMakeLists.txt")
    for name, value in re.findall(r"set\((\w+) (-m[^)]*)\)", text):
        text = text.replace(f"${{{name}}}", value)
    return {
        level: flags.split()
        for level, flags in re.findall(r"add_isa_objects\((\w+)([^)]*)\)", text)
    }


# Levels that replace a few kernels of another one.
SOURCES_OF_PARTS = {
    "neon_dot": {"qgemm_dot.cc"},
    "avx512_vnni": {"qgemm_kernel.cc", "qgemm_vnni.cc", "roofline_dot.cc"},
    "avx512_bf16": {"gemm_bf16.cc", "roofline_dot.cc"},
    "amx": {"gemm_amx.cc", "gemm_split.cc", "roofline_amx.cc"},
}


def objects_of_trees(trees):
    """Objects of csrc/simd in these build trees, all of them: every source at every level."""
    wanted = {
        (level, source.name)
        for level, compiled, *_ in _core.isa_levels()
        for source in (ROOT / "csrc/simd").glob("*.cc")
        if compiled and source.name in SOURCES_OF_PARTS.get(level, {source.name})
    }
    found = []
    for tree in trees:
        objects = list((ROOT / "build" / tree / "CMakeFiles").glob("tilewright_simd_*.dir/**/*.o"))
        levels = [re.search(r"tilewright_simd_(\w+)\.dir", str(path))[1] for path in objects]
        missing = wanted - {(n, p.stem) for n, p in zip(levels, objects, strict=True)}
        assert not missing, f"build/{tree} lacks objects of {sorted(missing)}"
        found += objects
    return found


def simd_objects(folder):
    """Objects of csrc/simd: of the build trees in TILEWRIGHT_TEST_TREES, which must be complete.

    Without that variable of every build tree there is, else some compiled for this test.
    """
    if trees := os.environ.get("TILEWRIGHT_TEST_TREES", "").split():
        return objects_of_trees(trees)
    built = list((ROOT / "build").glob("*/CMakeFiles/tilewright_simd_*.dir/**/*.o"))
    if built:
        return built
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("neither a build tree nor a compiler")
    flags = flags_of_levels()
    level = "avx512" if "avx512" in flags else "generic"
    common = ["-std=c++20", "-O1", "-fPIC", "-fno-exceptions", "-fno-rtti", "-Wno-psabi"]
    common += [
        f"-DISA={level}",
        f"-DISA_{level}=1",
        "-I",
        ROOT / "csrc",
        "-I",
        ROOT / "csrc/include",
    ]
    made = []
    for source in sorted((ROOT / "csrc/simd").glob("*.cc")):
        made.append(folder / f"{source.stem}.o")
        command = [compiler, *common, *flags[level], "-c", source, "-o", made[-1]]
        subprocess.run(command, check=True, timeout=300)
    return made


def test_a_build_tree_without_a_level_is_no_proof():
    with pytest.raises(AssertionError, match=r"build/none lacks objects of .*'generic'"):
        objects_of_trees(["none"])


def test_no_weak_symbols_leave_the_simd_objects(tmp_path):
    """The linker could keep a weak function of a newer CPU for everyone: a known crash."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    weak = []
    for path in simd_objects(tmp_path):
        symbols = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
        weak += [f"{path.name}: {s}" for s in symbols.splitlines() if re.search(r" [WwVvu] ", s)]
    assert not weak, weak


def test_simd_objects_export_their_fill_functions_only(tmp_path):
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    wrong = []
    for path in simd_objects(tmp_path):
        listing = subprocess.run(
            ["nm", "-C", "--defined-only", "--extern-only", path],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        wrong += [
            f"{path.name}: {s}"
            for s in listing.splitlines()
            if not re.search(r" T tilewright::\w+::fill_\w+\(", s) and "asan" not in s
        ]
    assert not wrong, wrong


def test_the_table_of_functions_has_the_worse_of_two_machines():
    if not (ROOT / "docs").is_dir():
        pytest.skip("installed without docs/")
    printed = """\
        exp                generic    0.945 ulp, claimed 1.1, at 0x1.234c58p+2
        exp                avx2       0.992 ulp, claimed 1.1, at -0x1.75c872p+2
ok      exp_is_accurate
        tanh'              avx2       4.337 ulp, claimed 5.5, at -0x1.d3893ap-1
        exp                generic    0.951 ulp, claimed 1.1, at 0x1p+2
        exp                neon       0.900 ulp, claimed 1.1, at -0x1p+2
"""
    table = runpy.run_path(str(ROOT / "docs" / "functions.py"))["table"]
    assert table(printed.splitlines(keepends=True)).splitlines() == [
        "| function | generic | avx2 | neon |",
        "|---|--:|--:|--:|",
        "| exp | 0.95 ≤ 1.1 | 0.99 ≤ 1.1 | 0.90 ≤ 1.1 |",
        "| tanh' |  | 4.34 ≤ 5.5 |  |",
    ]


@pytest.mark.parametrize("name", OPS)
def test_op_is_complete(name):
    op = OPS[name]
    text = op.__doc__ or ""
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in text, f"{name}: its docstring lacks {section}"
    for parameter in op.params:
        assert re.search(rf"\b{parameter}\b", text), f"{name}: {parameter} is not documented"
    assert op.reference is not None, f"{name}: no reference"
    assert op.cases, f"{name}: no cases"
    assert op.make is not None, f"{name}: no make"
    assert op.cost is not None, f"{name}: no cost"
    assert not op.grads or op.backward is not None, f"{name}: grads without backward"
    assert getattr(tw, name) is op, f"tw.{name} is not the registered op"


def test_public_names_exist_and_are_documented():
    missing = [n for n in tw.__all__ if not hasattr(tw, n)]
    assert not missing, missing
    silent = [n for n in tw.__all__ if callable(getattr(tw, n)) and not getattr(tw, n).__doc__]
    assert not silent, silent


def test_public_names_are_on_a_page_of_the_site(monkeypatch):
    """docs/hooks.py writes the reference from lists of names; mkdocs itself is not needed here."""
    if not (ROOT / "docs").is_dir():
        pytest.skip("installed without docs/")
    for name in ("mkdocs", "mkdocs.structure", "mkdocs.structure.files"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    files = sys.modules["mkdocs.structure.files"]
    files.File = files.Files = object
    pages = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["pages"]()
    text = "\n".join(page for name, page in pages.items() if name.startswith("reference/"))
    described = set(re.findall(r"^## (\w+)$", text, re.MULTILINE))
    folders = {n for n in tw.__all__ if isinstance(getattr(tw, n), types.ModuleType)}
    missing = set(tw.__all__) - folders - described
    missing |= {n for n in folders if not re.search(rf"^{n}\.\w+", text, re.MULTILINE)}
    assert not missing, missing


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "python" / "tilewright" / "py.typed").is_file()

"""Evidence about the CUDA kernels' speed that needs no GPU: what ptxas made, what it must move.

    python bench/sass_report.py build/emulated/_emulated_checked.*.so build/cuda/cuda

Reads the cubins that the preset `cuda` keeps, by nvdisasm (PyPI: nvidia-cuda-nvdisasm), and runs
calls on the emulator for their launches and counters. Nothing in the tables is measured:
README.md says what each column is, and by which formula.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import ml_dtypes
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # its test has both already, perhaps from an installed package
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "python")]

import emulated  # noqa: E402  (the emulated device is the tests')
from ptx.programs import common_name, symbols  # noqa: E402

# Registers and shared bytes of a processor, its most threads and blocks; a block costs 1 KiB more.
PROCESSORS = {"sm_80": (65536, 164 << 10, 2048, 32), "sm_90": (65536, 228 << 10, 2048, 32)}
TENSOR = ("HMMA", "IMMA")
CYCLES = 2  # of an A100's processor for one mma: 2048 products of 16 bits at 1024 a cycle
WORDS = 128  # bytes of shared memory that a cycle moves


STATIC = ["kernel", "call", "threads", "registers", "spills", "shared KiB"]
STATIC += [f"blocks {processor}" for processor in PROCESSORS] + ["loop"]
MOVED = ["call", "kernel", "tensor cycles", "wavefronts", "ideal", "wavefronts / tensor"]
MOVED += ["in the loop", "L2 MB", "useful", "least MB of the call"]


class Code(NamedTuple):
    registers: int
    mix: collections.Counter[str]
    loop: collections.Counter[str]  # the innermost loop with the most tensor instructions


def occupancy(processor, registers, shared, threads):
    """How many blocks a processor holds at once."""
    all_registers, all_shared, most_threads, most_blocks = PROCESSORS[processor]
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = all_registers // 4 // of_warp * 4 // warps  # a quarter has registers of its own
    by_shared = all_shared // (-(-(shared + 1024) // 128) * 128)
    return min(most_threads // (32 * warps), most_blocks, by_registers, by_shared)


def installed(tool):
    """Where pip has put a tool of CUDA; its bare name otherwise."""
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations if package else ():
        path = pathlib.Path(folder, "cu13/bin", tool)
        if path.exists():
            return str(path)
    return tool


INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(.*?);")


def disassembled(nvdisasm, cubin):
    """The Code of each kernel in a cubin, by its name."""
    text = subprocess.run([nvdisasm, "-c", cubin], check=True, capture_output=True, text=True)
    found = {}
    for section in text.stdout.split("\n\t.section\t.text.")[1:]:
        name = re.match(r"\w+", section)[0]
        registers = int(re.search(r"SHI_REGISTERS=(\d+)", section)[1])
        names, labels, loop = [], {}, collections.Counter()
        for line in section.splitlines():
            if label := re.match(r"(\.L_\w+):", line):
                labels[label[1]] = len(names)
            elif instruction := INSTRUCTION.match(line):
                names.append(instruction[1])
                target = re.search(r"\.L_\w+", instruction[2])
                if instruction[1] == "BRA" and target and target[0] in labels:
                    body = collections.Counter(names[labels[target[0]] :])
                    if _rank(body) > _rank(loop):
                        loop = body
        found[common_name(name)] = Code(registers, collections.Counter(names), loop)
    return found


def _rank(body):
    return tensor(body), -body.total()


def tensor(body):
    return sum(body[name] for name in TENSOR)


def calls():
    """(what, function, fewest bytes to and from DRAM, function of half the depth or None) of each.

    Half the depth is half of K, or of the keys: what is missing then was the main loop's.
    """
    import tilewright as tw

    rng = np.random.default_rng(0)

    def on_device(x):
        made = emulated.DEVICE.empty(x.shape, x.dtype)  # aligned as a GPU's allocator aligns
        made.host[...] = x
        return made

    def normal(dtype, *shape):
        return on_device(rng.standard_normal(shape, np.float32).astype(dtype))

    def product(dtype, precision, M, K, N):
        a, b = normal(dtype, M, K), normal(dtype, K, N)

        def call():
            with tw.options(precision=precision):
                return tw.matmul(a, b)

        return call, (M * K + K * N + M * N) * np.dtype(dtype).itemsize

    def integers(M, K, N):
        a, b = (on_device(rng.integers(-128, 128, s).astype(np.int8)) for s in ((M, K), (N, K)))
        return (lambda: tw.int8_matmul(a, b.T)), M * K + K * N + 4 * M * N

    def attention(D, backward, causal=True, keys=256):
        q, k, v, dy = (normal(ml_dtypes.bfloat16, 1, 2, n, D) for n in (256, keys, keys, 256))
        size = 2 * 2 * 256 * D
        if not backward:
            return (lambda: tw.attention(q, k, v, causal=causal)), 2 * size + 2 * size * keys // 256
        tensors = [tw.tensor(x, requires_grad=True) for x in (q, k, v)]
        return (lambda: tw.attention(*tensors, causal=True).backward(dy)), 12 * size

    bf16, f32 = ml_dtypes.bfloat16, np.float32
    for dtype, precision, M, K, N in (
        (bf16, "highest", 1024, 256, 1024),
        (bf16, "highest", 256, 256, 256),
        (bf16, "highest", 16, 256, 1024),
        (f32, "medium", 1024, 256, 1024),
        (f32, "high", 1024, 256, 1024),
    ):
        what = f"matmul {np.dtype(dtype)} {precision} {M} x {K} x {N}"
        half, _ = product(dtype, precision, M, K // 2, N)
        yield what, *product(dtype, precision, M, K, N), half
    yield "int8_matmul 512 x 512 x 512", *integers(512, 512, 512), integers(512, 256, 512)[0]
    for D in (64, 128):
        what = f"attention bfloat16 1, 2, 256, {D}"
        half, _ = attention(D, False, causal=False, keys=128)
        yield what, *attention(D, False, causal=False), half
        yield f"{what} causal", *attention(D, False), None
        yield f"{what} causal +grad", *attention(D, True), None


def launches(call):
    """(name, launch, counters) of each kernel that a call starts."""
    from tilewright import _core

    seen, counters = [], []

    def observe(launch):
        counters.append(_core.emulator.take_counters())
        seen.append(launch)
        return False

    _core.emulator.set_runner(observe)
    try:
        call()
    finally:
        _core.emulator.set_runner(None)
    names = [common_name(symbols(launch["program"])[launch["offset"]]) for launch in seen]
    return zip(names, seen, [*counters[1:], _core.emulator.take_counters()], strict=True)


def static_row(launch, code):
    threads, shared = int(np.prod(launch["block"])), launch["shared_bytes"]
    held = []
    for processor in PROCESSORS:
        blocks = occupancy(processor, code.registers, shared, threads)
        held.append(f"{blocks} ({blocks * threads / PROCESSORS[processor][2]:.0%})")
    loop = code.loop
    mix = ", ".join(f"{n} {name}" for name, n in loop.most_common(7))
    share = f"{loop.total()}, {tensor(loop) / loop.total():.0%} tensor: {mix}" if loop else "-"
    spills = code.mix["LDL"] + code.mix["STL"]
    return threads, code.registers, spills, f"{shared / 1024:.0f}", *held, share


def cycles_and_wavefronts(counters):
    return CYCLES * counters["mma"], sum(s["wavefronts"] for s in counters["sites"])


def in_the_loop(counters, half):
    """Wavefronts for each tensor cycle of the main loop, which half the depth runs half as long."""
    whole, less = (cycles_and_wavefronts(c) for c in (counters, half))
    return (whole[1] - less[1]) / (whole[0] - less[0])


def emulated_row(counters, half):
    sites = counters["sites"]
    cycles, wavefronts = cycles_and_wavefronts(counters)
    ideal = sum(s["ideal_wavefronts"] for s in sites)
    sectors = sum(s["sectors"] for s in sites)
    useful = sum(s["ideal_sectors"] for s in sites)
    return (
        f"{cycles:,}",
        f"{wavefronts:,}",
        f"{ideal / wavefronts:.0%}" if wavefronts else "-",
        f"{wavefronts / cycles:.2f}" if cycles else "-",
        f"{in_the_loop(counters, half):.2f}" if half else "-",
        f"{32 * sectors / 1e6:.2f}",
        f"{useful / sectors:.0%}" if sectors else "-",
    )


def table(header, rows):
    print("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("extension", help="an emulated extension; checked, to count every access")
    parser.add_argument("cubins", type=pathlib.Path, help="the folder of cubins, at any depth")
    parser.add_argument("--nvdisasm", default=installed("nvdisasm"))
    arguments = parser.parse_args()
    emulated.load(arguments.extension)
    from tilewright.device import register

    register(emulated.EmulatedArray, emulated.DEVICE)
    codes = {}
    for cubin in sorted(arguments.cubins.rglob("*.sm_80.cubin")):
        if cubin.name.startswith(("matmul_mma", "int8_mma", "attention_")):
            codes |= disassembled(arguments.nvdisasm, cubin)
    static, moved = {}, []
    for what, call, least, half in calls():
        halves = {name: counters for name, _, counters in launches(half)} if half else {}
        for name, launch, counters in launches(call):
            if name not in codes:
                continue
            kernel = launch["what"].partition(":")[0]
            static.setdefault(name, (kernel, what, *static_row(launch, codes[name])))
            moved.append(
                (what, kernel, *emulated_row(counters, halves.get(name)), f"{least / 1e6:.2f}")
            )
    print("**Static and emulated evidence, not measured**")
    table(STATIC, static.values())
    table(MOVED, moved)


if __name__ == "__main__":
    main()

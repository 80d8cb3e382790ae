"""Fuzz the safetensors reader with libFuzzer, by atheris: `python .ci/fuzz.py -max_total_time=20`.

Whatever the bytes, load() gives arrays or raises FormatError. What it gives fills the file to the
last byte, and comes back the same from save(). An input is one byte that says how it becomes a
file, then a header and data: the length in front is the fuzzer's own for an even byte, else right.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["tilewright.io"]):
    import tilewright as tw

MEMORY = Path("/dev/shm")  # save() waits for the disk
TOKENS = (
    *("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "dtype", "shape", "data_offsets"),
    *("__metadata__", "{", "}", "[", "]", ",", ":", "null", "-1", "1e9", "9223372036854775807"),
    *("[0,0]", "[0,4]", "[4,8]", "[]", "\\ud800", '"', '\\"', "tilewright.quantized", ".scale"),
    *(".offset", "bits", "axis", "along", "group_size", '{"tilewright.quantized":"\\ud800"}'),
)


def file_of(data):
    """The file that an input stands for."""
    if not data or data[0] % 2 == 0:
        return data[1:]
    header, found, body = data[1:].partition(b"\n")
    return len(header).to_bytes(8, "little") + header + (body if found else b"")


def check(place, data):
    path = place / "input"
    whole = file_of(data)
    path.write_bytes(whole)
    try:
        arrays = tw.load(path)
    except tw.FormatError:
        with contextlib.suppress(tw.FormatError):
            tw.load_metadata(path)
        return
    start = 8 + int.from_bytes(whole[:8], "little")
    assert sum(p.nbytes for a in arrays.values() for p in parts(a)) == len(whole) - start
    tw.save(arrays, place / "again", metadata=tw.load_metadata(path) or None)
    again = tw.load(place / "again")
    assert list(again) == list(arrays)
    for name, array in arrays.items():
        for ours, theirs in zip(parts(array), parts(again[name]), strict=True):
            assert theirs.dtype == ours.dtype
            assert theirs.shape == ours.shape
            assert theirs.tobytes() == ours.tobytes()


def parts(array):
    """The plain arrays of one that was loaded."""
    if not isinstance(array, tw.QuantizedArray):
        return [array]
    return [part for part in (array.data, array.scale, array.offset) if part is not None]


def write_seeds(place):
    (place / "seeds").mkdir()
    examples = [
        {},
        {"x": np.float32([1, 2])},
        {"a": np.zeros((2, 0), np.int8), "b": np.ones((), np.float64), "c": np.arange(3) > 1},
        {"q": tw.quantize(np.float32([[1, 2, 3]]), bits=4, axis=0, symmetric=False)},
    ]
    for i, arrays in enumerate(examples):
        tw.save(arrays, place / "seed", metadata={"k": "v"} if i else None)
        file = (place / "seed").read_bytes()
        start = 8 + int.from_bytes(file[:8], "little")
        (place / f"seeds/raw{i}").write_bytes(b"\0" + file)
        (place / f"seeds/right{i}").write_bytes(b"\1" + file[8:start] + b"\n" + file[start:])
    quoted = [t.replace("\\", "\\\\").replace('"', '\\"') for t in TOKENS]
    (place / "tokens").write_text("".join(f'"{t}"\n' for t in quoted))


def fuzz(place):
    write_seeds(place)
    options = ["-max_len=4096", f"-dict={place / 'tokens'}", str(place / "seeds")]
    atheris.Setup([*sys.argv, *options], lambda data: check(place, data))
    atheris.Fuzz()  # ends the process


with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
    child = os.fork()
    if child == 0:
        fuzz(Path(folder))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(status)

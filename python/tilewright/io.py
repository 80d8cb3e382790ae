"""Checkpoints as safetensors files: read with suspicion, written aside and renamed.

    u64 little-endian n | n bytes of JSON | the tensors' bytes, one after the other without gaps
    {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {...}}

A file is believed in nothing: every number is checked against the file's own size before memory is
asked for, and what does not fit raises FormatError with the file and the tensor in its message.
Nothing is ever unpickled. Format: https://github.com/huggingface/safetensors

A QuantizedArray "w" is stored as it is, packed: the tensors "w", "w.scale" and perhaps "w.offset",
and in the metadata's "tilewright.quantized" what makes an array of them:

    {"w": {"bits": 4, "axis": 0, "along": 1, "group_size": 32, "shape": [768, 768]}}
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from tilewright.autograd import unwrap
from tilewright.device import as_array, moved
from tilewright.errors import DtypeError, FormatError, ShapeError, UnsupportedError
from tilewright.quantized import QuantizedArray

if TYPE_CHECKING:
    from pathlib import Path

_DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_QUANTIZED = "tilewright.quantized"  # key in the metadata
_FIELDS = ("bits", "axis", "along", "group_size")  # of a QuantizedArray, beside its shape
_LONGEST_HEADER = 100_000_000  # bytes; the reference implementation's limit
_MOST_AXES = 32  # NumPy 1's limit


class _Entry(NamedTuple):
    """A tensor of a file whose numbers have been checked."""

    name: str
    dtype: Any
    shape: tuple[int, ...]
    begin: int
    end: int


# Reading -------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the arrays of a safetensors file; quantized ones come back as QuantizedArrays.

    Raises:
        FormatError: the file is truncated, contradicts itself or holds a dtype that we don't have;
            the message names the file and the tensor.
        OSError: it can't be opened.
    """
    with _path(path).open("rb") as file:
        entries, metadata, start = _read_header(file, os.fspath(path))
        arrays = {}
        for entry in entries:
            file.seek(start + entry.begin)
            array = np.empty(entry.shape, entry.dtype)
            if file.readinto(_bytes(array)) != array.nbytes:
                _fail(os.fspath(path), f"tensor {entry.name!r}: the file ended inside it")
            arrays[entry.name] = array
    if _QUANTIZED in metadata:
        _assemble(arrays, metadata[_QUANTIZED], os.fspath(path))
    return arrays


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of a safetensors file: the strings that ``save`` was given.

    Raises:
        FormatError, OSError: as ``load``.
    """
    with _path(path).open("rb") as file:
        metadata = _read_header(file, os.fspath(path))[1]
    metadata.pop(_QUANTIZED, None)
    return metadata


def _read_header(file: BinaryIO, path: str) -> tuple[list[_Entry], dict[str, str], int]:
    """The checked entries in the order of their bytes, the metadata, where the bytes begin."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        _fail(path, f"must begin with 8 bytes of header length, has only {len(prefix)}")
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, _LONGEST_HEADER):
        _fail(path, f"the header claims {length} bytes, the file has {size - 8} after its length")
    text = file.read(length)
    if len(text) < length:
        _fail(path, "the file ended inside the header")
    header = _parse(text, path)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _fail(path, "the header's __metadata__ must map strings to strings")
    start = 8 + length
    entries = [_check_entry(path, name, fields) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_layout(path, entries, size - start)
    return entries, metadata, start


def _parse(text: bytes | str, path: str, what: str = "the header") -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            _fail(path, f"{what} has {twice!r} twice")
        return found

    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        header: Any = json.loads(decoded, object_pairs_hook=unique)
        if "\\u" in decoded:  # the one way to half a surrogate pair, which no file can hold
            json.dumps(header, ensure_ascii=False).encode("utf-8")
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: {what} is no JSON: {error}") from None
    if not isinstance(header, dict):
        _fail(path, f"{what} must be a JSON object, got {type(header).__name__}")
    return header


def _check_entry(path: str, name: str, fields: Any) -> _Entry:
    where = f"tensor {name!r}"
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        _fail(path, f"{where} must have exactly dtype, shape and data_offsets")
    dtype = _DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        _fail(path, f"{where}: unknown dtype {str(fields['dtype'])[:40]!r}")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _are_sizes(shape) or len(shape) > _MOST_AXES:
        _fail(path, f"{where}: shape must be at most {_MOST_AXES} sizes, got {str(shape)[:80]}")
    if math.prod(n or 1 for n in shape) * dtype.itemsize >= 2**63:  # NumPy refuses it even if empty
        _fail(path, f"{where}: shape {str(shape)[:80]} has more elements than an array can")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _fail(path, f"{where}: data_offsets must be [begin, end], got {str(offsets)[:80]}")
    begin, end = offsets
    need = math.prod(shape) * dtype.itemsize
    if end - begin != need:
        _fail(path, f"{where}: shape {shape} of {dtype} takes {need} bytes, has {end - begin}")
    return _Entry(name, dtype, tuple(shape), begin, end)


def _assemble(arrays: dict[str, Any], text: str, path: str) -> None:
    """Put QuantizedArrays into the places of their data, in the order of the file."""
    for name, fields in _parse(text, path, f"{_QUANTIZED} in the metadata").items():
        where = f"quantized tensor {name!r}"
        if name not in arrays or f"{name}.scale" not in arrays:
            _fail(path, f"{where}: it or its scale is missing")
        if not isinstance(fields, dict) or set(fields) != {*_FIELDS, "shape"}:
            _fail(path, f"{where} must have exactly {', '.join(_FIELDS)} and shape")
        if not _are_sizes(fields["shape"]):
            _fail(path, f"{where}: shape must be sizes, got {str(fields['shape'])[:80]}")
        scale, offset = arrays.pop(f"{name}.scale"), arrays.pop(f"{name}.offset", None)
        options = {**fields, "offset": offset, "shape": tuple(fields["shape"])}
        try:
            arrays[name] = QuantizedArray(arrays[name], scale, **options)
        except (ShapeError, DtypeError, UnsupportedError) as error:
            _fail(path, f"{where}: {error}")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_layout(path: str, entries: list[_Entry], available: int) -> None:
    """The tensors fill the data to the last byte, without gap or overlap."""
    at = 0
    for entry in entries:
        if entry.end > available:
            _fail(
                path,
                f"tensor {entry.name!r} ends at byte {entry.end} of {available} bytes of data",
            )
        if entry.begin != at:
            what = "overlaps the one before it" if entry.begin < at else "leaves a gap before it"
            _fail(path, f"tensor {entry.name!r} {what}: begins at {entry.begin}, expected {at}")
        at = entry.end
    if at != available:
        _fail(path, f"the tensors take {at} bytes, the file has {available}")


def _path(path: str | os.PathLike[str]) -> Path:
    from pathlib import Path  # it brings urllib along, a tenth of our import time

    return Path(path)


def _bytes(array: Any) -> Any:
    """A contiguous array's memory as a buffer; bfloat16 has none of its own."""
    return array.reshape(-1).view(np.uint8).data


def _fail(path: str, message: str) -> NoReturn:
    raise FormatError(f"{path}: {message}")


# Writing -------------------------------------------------------------------------------------


def save(
    arrays: dict[str, Any],
    path: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write arrays, Tensors or QuantizedArrays to a safetensors file.

    The file is written under a temporary name in the same folder, forced to the disk and renamed:
    whatever happens in between, ``path`` is the old file or the new one.

    Args:
        arrays: by name, of any strides; those of a device are copied to the CPU.
        path: of the file; the folder must exist.
        metadata: strings by name, kept in the header.

    Raises:
        DtypeError: an array's dtype has no name in the format.
        FormatError: an array has the name under which a QuantizedArray's scale or offset is kept.
        OSError: from the file system; ``path`` is untouched then.
    """
    arrays, metadata = _take_apart(arrays, metadata)
    values = {name: moved(as_array(unwrap(value)), None) for name, value in arrays.items()}
    header = _header(values, metadata)
    with _written_aside(_path(path)) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for array in values.values():
            whole = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
            file.write(_bytes(whole))


def _take_apart(
    arrays: dict[str, Any], metadata: dict[str, str] | None
) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Replace QuantizedArrays by their parts, and describe them in the metadata."""
    found: dict[str, Any] = {}
    descriptions: dict[str, Any] = {}
    for name, value in arrays.items():
        if not isinstance(value, QuantizedArray):
            found[name] = value
            continue
        parts = {name: value.data, f"{name}.scale": value.scale}
        if value.offset is not None:
            parts[f"{name}.offset"] = value.offset
        for taken in parts:
            if taken in found or (taken != name and taken in arrays):
                raise FormatError(f"save: {taken!r} is kept for a part of {name!r}")
        found |= parts
        fields = {field: getattr(value, field) for field in _FIELDS}
        descriptions[name] = {**fields, "shape": value.shape}
    if not descriptions:
        return found, metadata
    return found, {**(metadata or {}), _QUANTIZED: json.dumps(descriptions)}


def _header(values: dict[str, Any], metadata: dict[str, str] | None) -> bytes:
    fields: dict[str, Any] = {}
    if metadata:
        wrong = [k for k, v in metadata.items() if not (isinstance(k, str) and isinstance(v, str))]
        if wrong:
            raise TypeError(f"save: metadata must map strings to strings, {wrong[0]!r} does not")
        fields[_METADATA] = metadata
    at = 0
    for name, array in values.items():
        if not isinstance(name, str) or name == _METADATA:
            raise TypeError(f"save: a tensor's name must be a string other than {_METADATA!r}")
        dtype = _NAMES.get(array.dtype.newbyteorder("="))
        if dtype is None:
            raise DtypeError(
                f"save: tensor {name!r} must have one of {list(_DTYPES)}, got {array.dtype}"
            )
        end = at + array.nbytes
        fields[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return text + b" " * (-len(text) % 8)  # so that the data is aligned in the file


@contextlib.contextmanager
def _written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` only once it is wholly on the disk."""
    target = path.resolve()  # a link stays a link
    aside = target.with_name(f".{target.name}.{os.urandom(6).hex()}.tmp")
    try:
        with aside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename too
    finally:
        os.close(folder)

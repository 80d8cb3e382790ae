"""Text as bytes: documents, a held-out share of them, and a corpus that every Python carries."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SEPARATOR = 0  # the byte before every document: text holds none, so it can mean "a document starts"

# Folders of the standard library that are left out: other people's packages, tests and their
# fixtures, character tables that no one wrote, and the topics in their source form (they come in as
# text instead).
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
_SKIPPED_FOLDERS |= {"pydoc_data", "__pycache__"}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")  # what one machine's build wrote


class Document(NamedTuple):
    """One file's worth of text."""

    name: str
    text: bytes


class Corpus(NamedTuple):
    """Documents to learn from, and others to judge by."""

    train: list[Document]
    held_out: list[Document]


def standard_library() -> list[Document]:
    """Return the running Python's own source files and documentation topics, sorted by name.

    Tests, installed packages and generated tables are left out. What is there differs a little from
    one Python to the next; ``fingerprint`` tells two corpora apart.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = [
        Document(name, path.read_bytes())
        for path in root.rglob("*.py")
        if not _skipped(Path(name := path.relative_to(root).as_posix()))
    ]
    documents += [Document(f"topic:{name}", text.encode()) for name, text in _topics().items()]
    return sorted(document for document in documents if document.text)


def _skipped(path: Path) -> bool:
    return path.name.startswith(_SKIPPED_PREFIXES) or any(
        folder in _SKIPPED_FOLDERS or folder.startswith(_SKIPPED_PREFIXES)
        for folder in path.parts[:-1]
    )


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a Python without its documentation
        return {}
    return dict(topics)


def hold_out(documents: Sequence[Document], wanted: int) -> Corpus:
    """Hold out whole documents, about ``wanted`` bytes of them, chosen by the hash of their names.

    The choice depends on nothing but the names: the same documents are held out on every run.
    """
    held: set[str] = set()
    size = 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest()):
        if size >= wanted:
            break
        held.add(document.name)
        size += len(document.text)
    return Corpus(
        [d for d in documents if d.name not in held], [d for d in documents if d.name in held]
    )


def hold_out_tail(documents: Sequence[Document], share: float) -> Corpus:
    """Hold out the last ``share`` of every document: where whole ones can't be spared."""
    train, held = [], []
    for name, text in documents:
        cut = len(text) - int(len(text) * share)
        train.append(Document(name, text[:cut]))
        if cut < len(text):
            held.append(Document(f"{name} (tail)", text[cut:]))
    return Corpus(train, held)


def join(documents: Sequence[Document]) -> Any:
    """Return one uint8 array (bytes,), a separator before each document."""
    mark = bytes([SEPARATOR])
    return np.frombuffer(b"".join(mark + document.text for document in documents), np.uint8)


def size(documents: Sequence[Document]) -> int:
    """Return the bytes of text in all documents, separators not counted."""
    return sum(len(document.text) for document in documents)


def fingerprint(documents: Sequence[Document]) -> str:
    """Return a hash that tells one corpus from another by its texts; names don't count."""
    digest = hashlib.sha256()
    for _, text in documents:
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.hexdigest()[:16]

"""Text, batches, the log, and what a model is measured against."""

import lzma
import math
import zlib
from collections import Counter

import numpy as np
import pytest

from tilewright.training import (
    SEPARATOR,
    Batches,
    Corpus,
    Document,
    Log,
    baselines,
    byte_statistics,
    fingerprint,
    hold_out,
    hold_out_tail,
    join,
    size,
    standard_library,
)


def test_the_standard_library_is_source_and_topics_without_tests_and_packages():
    documents = standard_library()
    names = {document.name for document in documents}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any("/tests/" in n or "site-packages" in n or n.startswith("test/") for n in names)
    assert size(documents) > 5e6
    assert all(SEPARATOR not in document.text for document in documents)


def test_whole_files_are_held_out_by_name_alone():
    documents = [Document(f"{i}.py", b"x" * (100 + i)) for i in range(50)]
    corpus = hold_out(documents, 1000)
    assert 1000 <= size(corpus.held_out) < 1200
    assert sorted(corpus.train + corpus.held_out) == sorted(documents)
    assert hold_out(documents[::-1], 1000).held_out == corpus.held_out[::-1]


def test_a_tail_is_held_out_of_every_file():
    corpus = hold_out_tail([Document("a", bytes(range(1, 101))), Document("b", b"short")], 0.05)
    assert [len(d.text) for d in corpus.train] == [95, 5]
    assert [d.text for d in corpus.held_out] == [bytes(range(96, 101))]


def test_fingerprint_sees_texts_and_where_they_part_but_no_names():
    texts = [
        [Document("a", b"xy")],
        [Document("a", b"xz")],
        [Document("a", b"x"), Document("a", b"y")],
        [Document("a", b"y"), Document("a", b"x")],
    ]
    assert len({fingerprint(documents) for documents in texts}) == 4
    assert fingerprint([Document("/there/b", b"xy")]) == fingerprint(texts[0])


@pytest.mark.parametrize("order", [0, 1, 2])
def test_byte_statistics_are_witten_bell(order):
    """Against the formula written with dictionaries, byte by byte."""
    rng = np.random.default_rng(order)
    train = [Document("t", rng.integers(97, 103, 400, dtype=np.uint8).tobytes())]
    held = [Document("h", rng.integers(97, 105, 60, dtype=np.uint8).tobytes()), Document("i", b"a")]
    text = bytes([SEPARATOR]) + train[0].text
    counts = Counter(text[i : i + n] for n in (1, 2, 3) for i in range(len(text) - n + 1))
    following = Counter(key[:-1] for key in counts)

    def probability(context: bytes, c: int) -> float:
        shorter = probability(context[1:], c) if context else 1 / 256
        n = sum(counts[context + bytes([b])] for b in range(256))
        if n == 0:
            return shorter
        distinct = following[context]
        return (counts[context + bytes([c])] + distinct * shorter) / (n + distinct)

    bits = []
    for _, text in held:
        padded = bytes([SEPARATOR, SEPARATOR]) + text
        bits += [
            -math.log2(probability(padded[i - order : i], padded[i])) for i in range(2, len(padded))
        ]
    assert byte_statistics(join(train), held)[order] == pytest.approx(np.mean(bits), rel=1e-12)


def test_baselines_are_named_and_the_compressors_are_the_real_ones():
    documents = standard_library()[:40]
    corpus = hold_out(documents, 20_000)
    found = {b.name: b.bits_per_byte for b in baselines(corpus)}
    assert list(found) == ["order 0", "order 1", "order 2", "zlib", "lzma"]
    assert found["order 0"] > found["order 1"] > found["order 2"] > 1
    total = sum(len(zlib.compress(d.text, 9)) for d in corpus.held_out)
    assert found["zlib"] == pytest.approx(8 * total / size(corpus.held_out))
    for document in corpus.held_out:
        assert zlib.decompress(zlib.compress(document.text, 9)) == document.text
    total = sum(len(lzma.compress(d.text, preset=9 | lzma.PRESET_EXTREME)) for d in corpus.held_out)
    assert found["lzma"] == pytest.approx(8 * total / size(corpus.held_out))


def test_an_epoch_reads_every_window_once_in_another_order_each_time():
    text = np.arange(1000, dtype=np.uint16)  # every value once, so that a window names its place
    batches = Batches(text, context=9, batch=11, seed=3)
    assert batches.windows == 110
    epochs = []
    for epoch in range(2):
        starts = []
        for step in range(10 * epoch, 10 * epoch + 10):
            ids, targets = batches.at(step)
            assert ids.shape == targets.shape == (11, 9)
            np.testing.assert_array_equal(ids + 1, targets)
            starts += ids[:, 0].tolist()
        assert len(set(starts)) == 110
        assert len({start % 9 for start in starts}) == 1
        epochs.append(starts)
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_seed_and_step_alone():
    text = np.arange(1000, dtype=np.uint16)
    straight = Batches(text, context=7, batch=5, seed=1)
    expected = [straight.at(step)[0] for step in range(70)]
    for step in (69, 3, 41):  # in any order, from a fresh start
        np.testing.assert_array_equal(
            Batches(text, context=7, batch=5, seed=1).at(step)[0], expected[step]
        )
    assert not np.array_equal(Batches(text, context=7, batch=5, seed=2).at(0)[0], expected[0])


def test_a_text_shorter_than_two_contexts_is_refused():
    with pytest.raises(ValueError, match=r"at least 16 bytes.*got 15"):
        Batches(np.zeros(15, np.uint8), context=8, batch=1, seed=0)
    assert Batches(np.zeros(16, np.uint8), context=8, batch=1, seed=0).at(0)[0].shape == (1, 8)


def test_the_log_survives_a_cut_line_and_rewinds(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    assert log.entries() == []
    for step in (1, 2, 3):
        log.write("step", step, loss=0.5 * step)
    log.write("validation", 3, bits_per_byte=2.0)
    with log.path.open("a") as file:
        file.write('{"kind": "step", "st')
    assert [e["loss"] for e in log.entries("step")] == [0.5, 1.0, 1.5]
    log.rewind(2)
    assert [e["step"] for e in log.entries()] == [1, 2]
    log.write("step", 3, loss=9.0)
    assert log.entries("step")[-1]["loss"] == 9.0


def test_an_empty_held_out_part_is_no_crash():
    assert hold_out_tail([Document("a", b"x")], 0.05) == Corpus([Document("a", b"x")], [])

"""tw.options: what a call runs under belongs to its context, not to the process."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading

import numpy as np
import pytest

import harness
import tilewright as tw
from tilewright import _core
from tilewright.runtime import active_isa


@pytest.fixture(autouse=True)
def defaults():
    """The process's defaults, restored."""
    before = _core.effective_options()
    yield
    tw.set_options(**before)


def here():
    return active_isa(), tw.get_num_threads()


def result():
    """Bits that differ between the generic level and the others, and a level's name in a pack."""
    a = np.random.default_rng(3).standard_normal((8, 1000)).astype(np.float32)
    return tw.matmul(a, a.T).tobytes(), tw.pack(a).isa


RESULTS = {}
for name in harness.SUPPORTED_ISAS:
    with tw.options(isa=name):
        RESULTS[name] = result()


def test_levels_can_be_told_apart():
    assert len({level for _, level in RESULTS.values()}) == len(RESULTS)
    assert len({bits for bits, _ in RESULTS.values()}) == min(2, len(RESULTS))


def test_a_block_ends_where_it_ends():
    before = _core.effective_options()
    with tw.options(threads=3, isa="generic", precision="high", batch_invariant=False):
        assert _core.effective_options() == {
            "threads": 3, "isa": "generic", "precision": "high", "batch_invariant": False
        }  # fmt: skip
        assert result() == RESULTS["generic"]
        assert [level.name for level in tw.isas() if level.active] == ["generic"]
    assert _core.effective_options() == before
    with pytest.raises(KeyError), tw.options(threads=3):
        raise KeyError
    assert _core.effective_options() == before


def test_blocks_nest_and_what_is_left_out_stays():
    with tw.options(threads=3, isa="generic"):
        with tw.options(threads=2):
            assert here() == ("generic", 2)
            with tw.options(isa="", precision="medium"):
                assert here() == (harness.SUPPORTED_ISAS[-1], 2)
                assert result() == RESULTS[harness.SUPPORTED_ISAS[-1]]
        assert here() == ("generic", 3)


def test_process_defaults_are_below_every_context(isa):
    tw.set_options(threads=2, precision="high", batch_invariant=False)
    assert here() == (isa, 2)
    with tw.options(threads=4):
        tw.set_num_threads(3)
        tw.set_isa("generic")
        assert here() == ("generic", 4)
        assert _core.effective_options()["precision"] == "high"
    assert here() == ("generic", 3)
    tw.set_matmul_precision("medium")
    assert _core.effective_options()["precision"] == "medium"


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"threads": 0}, tw.ShapeError, r"threads must be in 1\.\.1024, got 0"),
        ({"threads": 1025}, tw.ShapeError, "got 1025"),
        ({"isa": "sse9"}, tw.UnsupportedError, "generic.*got 'sse9'"),
        ({"precision": "tf32"}, tw.UnsupportedError, "'highest', 'high' or 'medium', got 'tf32'"),
    ],
)
def test_impossible_values_change_nothing(wrong, error, text):
    before = _core.effective_options()
    with pytest.raises(error, match=text), tw.options(batch_invariant=False, **wrong):
        pass
    with pytest.raises(error, match=text):
        tw.set_options(batch_invariant=False, **wrong)
    assert _core.effective_options() == before


def test_threads_don_t_see_each_other():
    """Two threads run kernels at the same time, each on its own level and thread count."""
    barrier, wrong = threading.Barrier(2), []

    def work(level, threads):
        with tw.options(isa=level, threads=threads):
            for _ in range(100):
                barrier.wait()
                if here() != (level, threads) or result() != RESULTS[level]:
                    wrong.append((level, here()))

    levels = harness.SUPPORTED_ISAS[0], harness.SUPPORTED_ISAS[-1]
    workers = [threading.Thread(target=work, args=(levels[i], 1 + i)) for i in range(2)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_a_thread_starts_from_the_defaults_unless_it_is_given_a_context():
    seen = []
    with tw.options(threads=7):
        context = contextvars.copy_context()
        for target in (
            lambda: seen.append(here()),
            lambda: context.run(lambda: seen.append(here())),
        ):
            thread = threading.Thread(target=target, **own_context())
            thread.start()
            thread.join()
    assert seen[0] == here()
    assert seen[1] == (active_isa(), 7)


def own_context():
    """Free-threaded Python 3.14 hands the context on by itself."""
    return {"context": contextvars.Context()} if sys.version_info >= (3, 14) else {}


def test_tasks_that_take_turns_on_one_thread():
    async def task(level, threads):
        with tw.options(isa=level, threads=threads):
            for _ in range(20):
                await asyncio.sleep(0)
                assert here() == (level, threads)
                assert result() == RESULTS[level]

    async def all_of_them():
        with tw.options(precision="high"):
            inherits = asyncio.create_task(precision_after_a_turn())
        levels = harness.SUPPORTED_ISAS
        await asyncio.gather(*(task(levels[i % len(levels)], 1 + i) for i in range(6)))
        return await inherits

    async def precision_after_a_turn():
        await asyncio.sleep(0)
        return _core.effective_options()["precision"]

    assert asyncio.run(all_of_them()) == "high"
    assert _core.effective_options()["precision"] == "highest"


def test_every_op_follows(isa):
    """A packed matrix belongs to its level: a call that runs on another one says so."""
    b = np.ones((4, 4), np.float32)
    packed = tw.pack(b)
    assert packed.isa == isa
    elsewhere = next(n for n in harness.SUPPORTED_ISAS if n != isa)
    with tw.options(isa=elsewhere):
        assert tw.pack(b).isa == elsewhere
        assert tw.pack(tw.quantize(b)).isa == elsewhere
        with pytest.raises(tw.UnsupportedError, match=f"active one is {elsewhere}"):
            tw.matmul(b, packed)
    linear = tw.nn.Linear(3, 3).eval()
    with tw.no_grad():
        x = np.ones((2, 3), np.float32)
        first = linear(x)
        with tw.options(isa=elsewhere):
            linear(x)  # packed again
        assert harness.same_bits(linear(x).numpy(), first.numpy())


def test_the_bits_depend_on_level_and_precision_alone(isa, rng):
    """Matrix units make the precisions differ; without them all are the same kernel."""
    a = rng.standard_normal((300, 400)).astype(np.float32)
    highest = tw.matmul(a, a.T)
    for precision in ("highest", "high", "medium"):
        with tw.options(precision=precision):
            want = tw.matmul(a, a.T)
        for threads in (1, 2, 5):
            with tw.options(threads=threads, precision=precision, batch_invariant=False):
                assert harness.same_bits(tw.matmul(a, a.T), want)
        differs = isa == "amx" and precision != "highest"
        assert harness.same_bits(want, highest) != differs

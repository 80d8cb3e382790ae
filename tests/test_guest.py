"""A good guest in someone else's process: import, fork, Ctrl-C, threads, the GIL, floating-point
state.

Whatever could hang or kill runs in an interpreter of its own, under a time limit. Speed is measured
in bench/, never here: the limits below are only there to tell a hang from an answer.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import harness
import tilewright as tw
from tilewright import _core
from tilewright.registry import OPS

HANG = 120  # seconds

# Any machine takes much longer than a few seconds for this product, and it needs little memory:
# views of stride 0.
ENDLESS = """
import numpy as np, tilewright as tw
def operands(M, N, K):
    a = np.broadcast_to(np.ones((M, 1), np.float32), (M, K))
    b = np.broadcast_to(np.ones((1, N), np.float32), (K, N))
    return a, b
a, b = operands(3000, 3000, 120_000)
"""


def run(code, *, prefix=(), **environment):
    """Run code in a fresh interpreter; returns what it printed."""
    done = subprocess.run(
        [*prefix, sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_import_brings_nothing_heavy():
    """What makes an import slow is what it imports."""
    code = """
        import sys, numpy, ml_dtypes
        before = set(sys.modules)
        import tilewright
        print(*sorted({m.split(".")[0] for m in set(sys.modules) - before}))
    """
    heavy = {"matplotlib", "rich", "torch", "scipy", "pandas", "cupy", "psutil", "threadpoolctl"}
    heavy |= {"asyncio", "multiprocessing", "subprocess", "http", "unittest", "pydoc", "sqlite3"}
    assert not heavy & set(run(code).split())


def test_import_starts_no_thread_and_prints_nothing():
    code = """
        import os, numpy, ml_dtypes
        before = len(os.listdir("/proc/self/task"))
        import tilewright
        assert len(os.listdir("/proc/self/task")) == before
    """
    assert run(code) == ""


def test_import_and_kernels_leave_the_floating_point_state_alone():
    """Flush-to-zero, once set by a library, changes everybody's results."""
    if platform.machine() != "x86_64":
        pytest.skip("reads MXCSR")
    code = """
        import ctypes, struct, numpy as np
        from concurrent.futures import ThreadPoolExecutor
        libm = ctypes.CDLL("libm.so.6")
        def state():
            '''MXCSR: 28 bytes into x86-64's environment; without the flags of past operations.'''
            buffer = ctypes.create_string_buffer(64)
            assert libm.fegetenv(buffer) == 0
            return struct.unpack_from("I", buffer, 28)[0] & ~0x3F
        tiny = np.full(8, 1e-40, np.float32)
        before, half = state(), (tiny / 2).tobytes()
        import tilewright as tw
        assert state() == before, "import changed the control word"
        x = np.ones((300, 300), np.float32)
        for name in [l.name for l in tw.isas() if l.supported]:
            tw.set_isa(name)
            tw.matmul(x, x)
        assert state() == before, "a kernel changed the control word"
        assert (tiny / 2).tobytes() == half
        a, b = (np.full((1, 1), 2.0**n, np.float32) for n in (-100, -40))
        assert tw.matmul(a, b)[0, 0] == 2.0**-140
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(state).result() == before
    """
    run(code)


FORK = """
    import os, threading, time
    import numpy as np, tilewright as tw
    tw.set_num_threads(2)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((500, 500)).astype(np.float32) for _ in range(2))
    want = tw.matmul(a, b)

    def child_is_right():
        pid = os.fork()
        if pid == 0:
            right = all((tw.matmul(a, b) == want).all() for _ in range(3))
            threads = len(os.listdir("/proc/self/task"))
            os._exit(0 if right and threads == 2 else 1)  # a pool of its own: itself and one worker
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return status == 0
            time.sleep(0.002)
        os.kill(pid, 9)
        raise SystemExit("the child hangs")
"""


def test_fork_after_a_parallel_call():
    code = (
        FORK
        + """
    for _ in range(5):
        assert child_is_right()
    assert (tw.matmul(a, b) == want).all()
    """
    )
    run(code)


def test_fork_during_another_threads_kernel():
    code = (
        FORK
        + """
    stop = threading.Event()
    def work():
        x = np.ones((900, 900), np.float32)
        while not stop.is_set():
            tw.matmul(x, x)
    worker = threading.Thread(target=work)
    worker.start()
    for i in range(10):
        time.sleep(0.003 * i)
        assert child_is_right()
    stop.set()
    worker.join()
    assert (tw.matmul(a, b) == want).all()
    """
    )
    run(code)


def test_grandchildren_work_too():
    code = (
        FORK
        + """
    pid = os.fork()
    if pid == 0:
        os._exit(0 if child_is_right() and (tw.matmul(a, b) == want).all() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    """
    )
    run(code)


@pytest.mark.parametrize("count", [1, 2])
def test_a_hundred_interrupts(count):
    """Each ends a product that would take far longer than 5 seconds, and the pool works on."""
    code = ENDLESS + textwrap.dedent(f"""
        import os, signal, threading, time
        tw.set_num_threads({count})
        x = np.ones((300, 300), np.float32)
        slowest = 0.0
        for i in range({100 if count > 1 else 10}):
            sent = []
            def interrupt():
                time.sleep(0.001 * (i % 20))
                sent.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGINT)
            thread = threading.Thread(target=interrupt)
            try:
                thread.start()
                tw.matmul(a, b)
                raise SystemExit("the product came to its end")
            except KeyboardInterrupt:
                slowest = max(slowest, time.monotonic() - sent[0])
            thread.join()
            assert (tw.matmul(x, x) == 300).all(), "the pool is broken"
        assert slowest < 5, f"an interrupt waited for {{slowest:.1f}} s"
        print(f"slowest answer: {{1e3 * slowest:.0f}} ms")
    """)
    print(run(code))


def test_a_signal_handler_that_raises_decides_the_exception():
    code = ENDLESS + textwrap.dedent("""
        import signal
        class Alarm(Exception): pass
        def handler(*_): raise Alarm("wake up")
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        try:
            tw.matmul(a, b)
        except Alarm:
            print("alarm")
    """)
    assert run(code) == "alarm\n"


def test_a_signal_handler_that_returns_lets_the_kernel_finish():
    code = ENDLESS + textwrap.dedent("""
        import signal
        rings = []
        signal.signal(signal.SIGALRM, lambda *_: rings.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        a, b = operands(500, 500, 20_000)
        y = tw.matmul(a, b)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert (y == 20_000).all()
        assert rings
    """)
    run(code)


# Each takes a second or so, in parallel regions of a few milliseconds or less, or in one long task.
MANY_REGIONS = {
    "matmul, chunks of columns": "tw.matmul(ones(8, 4096), ones(4096, 300_000))",
    "matmul, one long task": "tw.matmul(ones(1, 100_000_000), ones(100_000_000, 32))",
    "int8_matmul": "tw.int8_matmul(ones(8, 4096).astype('i1'), ones(4096, 500_000, dtype='i1'))",
    "attention_varlen": """tw.attention_varlen(
        ones(300 * 64, 1, 64), ones(300 * 16384, 1, 64), ones(300 * 16384, 1, 64),
        np.arange(301) * 64, np.arange(301) * 16384)""",
    "quantize, groups": "tw.quantize(ones(8_000_000, 1), axis=1, group_size=1)",
    "quantize, matrices": "tw.quantize(np.broadcast_to(np.float32(1), (20_000_000, 2, 2)), axis=1)",
    "embedding": "tw.embedding(np.broadcast_to(np.int32(0), 300_000_000), ones(3, 0))",
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("call", MANY_REGIONS.values(), ids=MANY_REGIONS)
def test_signals_are_answered_during_calls_of_many_regions(call, count):
    """A call that never looks runs a handler once: when it is over."""
    code = f"""
        import signal, time
        import numpy as np, tilewright as tw
        def ones(*shape, dtype=np.float32):
            return np.broadcast_to(np.ones(shape[-1:], dtype), shape)
        tw.set_num_threads({count})
        rings = []
        signal.signal(signal.SIGALRM, lambda *_: rings.append(time.monotonic()))
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
        begin = time.monotonic()
        result = {textwrap.indent(call, " " * 8).strip()}
        end = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0)
        inside = [t for t in rings if begin < t < end - 0.005]
        print(len(inside), "rings in", end - begin, "s")
        assert end - begin < 0.2 or len(inside) >= 4
    """
    print(run(code))


def test_lengths_are_read_once():
    """Whoever writes to kv_lengths while the kernel runs changes nothing, and it reads no key that
    isn't there: the answer is that of the old lengths or of the new ones, never of some of each.
    Where the alarm rings before the call, which a busy machine may do, it is set again, later."""
    code = """
        import signal
        import numpy as np, tilewright as tw
        tw.set_num_threads(1)
        q, k, v = (np.random.default_rng(n).standard_normal((64, 1, 512, 64), np.float32)
                   for n in range(3))
        before, after = (tw.attention(q, k, v, kv_lengths=np.full(64, n)) for n in (512, 7))
        for dtype in (np.int32, np.int64):
            lengths = np.empty(64, dtype)
            def handler(*_):
                lengths[:] = 7
            signal.signal(signal.SIGALRM, handler)
            for delay in np.geomspace(0.001, 1, 30):
                lengths[:] = 512
                signal.setitimer(signal.ITIMER_REAL, delay)
                got = tw.attention(q, k, v, kv_lengths=lengths)
                signal.setitimer(signal.ITIMER_REAL, 0)
                late = (lengths == 512).all()
                assert (got == before).all() or (got == after).all()
                if not late and (got == before).all():
                    break
            else:
                raise AssertionError("no alarm rang while the kernel ran")
    """
    run(code)


def test_daemon_threads_may_be_in_a_kernel_when_the_interpreter_ends():
    code = """
        import threading, time
        import numpy as np, tilewright as tw
        x = np.ones((60, 60), np.float32)
        def work():
            while True:
                tw.matmul(x, x)
                tw.layernorm(x, x[0], x[0])
        for _ in range(4):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.01)
    """
    for _ in range(20):
        run(code)


COUNT = "import tilewright as tw; print(tw.get_num_threads())"


def free(**environment):
    """The environment without thread variables, and these."""
    names = ("TILEWRIGHT_NUM_THREADS", "OMP_NUM_THREADS")
    return {**dict.fromkeys(names, ""), **environment}


def test_default_threads_follow_the_affinity():
    if shutil.which("taskset") is None:
        pytest.skip("no taskset")
    cpu = str(min(os.sched_getaffinity(0)))
    assert run(COUNT, prefix=("taskset", "-c", cpu), **free()) == "1\n"
    assert int(run(COUNT, **free())) <= len(os.sched_getaffinity(0))


def test_default_threads_follow_the_environment():
    default = int(run(COUNT, **free()))
    assert run(COUNT, **free(OMP_NUM_THREADS="1")) == "1\n"
    assert int(run(COUNT, **free(OMP_NUM_THREADS="1000"))) == default
    assert run(COUNT, **free(OMP_NUM_THREADS="1,4")) == "1\n"
    assert run(COUNT, **free(TILEWRIGHT_NUM_THREADS="1")) == "1\n"
    assert int(run(COUNT, **free(TILEWRIGHT_NUM_THREADS="1000"))) == default
    assert run(COUNT, **free(TILEWRIGHT_NUM_THREADS="1000", OMP_NUM_THREADS="1")) == "1\n"
    for nonsense in ("many", "0", "-2", "1.5"):
        assert int(run(COUNT, **free(TILEWRIGHT_NUM_THREADS=nonsense))) == default
        assert int(run(COUNT, **free(OMP_NUM_THREADS=nonsense))) == default


def test_default_threads_follow_the_quota(tmp_path):
    """As the extension reads it: the C++ library that is linked in has streams without numbers."""
    group = tmp_path / "sys" / "fs" / "cgroup" / "here"
    for folder in (group, tmp_path / "proc" / "self"):
        folder.mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/here\n")
    (group / "cpu.max").write_text("150000 100000\n")
    assert ("cgroup quota", 1.5) in _core.thread_limits(str(tmp_path))
    (group / "cpu.max").write_text("max 100000\n")
    assert "cgroup quota" not in dict(_core.thread_limits(str(tmp_path)))


def test_threads_may_call_at_once(threads):
    """Four Python threads, each running every op: the bits of one thread alone."""
    threads(2)
    float32 = harness.DTYPES["float32"]
    jobs = [
        (op, harness.inputs(op.name, case, float32))
        for op in OPS.values()
        for case in op.cases[::4]
    ]
    wanted = [harness.as_tuple(harness.call(*job)) for job in jobs]
    wrong = []

    def work(offset):
        for i in range(len(jobs)):
            at = (i + offset * len(jobs) // 4) % len(jobs)
            try:
                got = harness.as_tuple(harness.call(*jobs[at]))
                if not all(harness.same_bits(g, w) for g, w in zip(got, wanted[at], strict=True)):
                    wrong.append(jobs[at][0].name)
            except Exception as error:
                wrong.append(repr(error))

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(HANG)
        assert not worker.is_alive(), "a thread hangs"
    assert not wrong, wrong[:5]


def test_the_gil_is_released(threads):
    """Another Python thread counts on while a kernel runs on this one."""
    threads(1)
    a = np.broadcast_to(np.ones((600, 1), np.float32), (600, 60_000))
    b = np.broadcast_to(np.ones((1, 600), np.float32), (60_000, 600))
    running, ticks = threading.Event(), []

    def count():
        while not running.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    counter = threading.Thread(target=count)
    counter.start()
    begin = time.monotonic()
    tw.matmul(a, b)
    end = time.monotonic()
    running.set()
    counter.join()
    inside = [t for t in ticks if begin + 0.1 * (end - begin) < t < end - 0.1 * (end - begin)]
    assert len(inside) >= 2, f"{len(inside)} ticks during a kernel of {end - begin:.3f} s"

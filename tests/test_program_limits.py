"""tw.compile: what is refused, errors, threads, Ctrl-C and fork."""

import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import harness
import tilewright as tw
from programs import Classifier, batch, same
from tilewright.autograd import Tensor

f32 = np.float32


# What is refused ----------------------------------------------------------------------------------


class Counting:
    """Steps that hide something from the program, each in its own way."""

    def __init__(self):
        self.calls = 0
        self.w = tw.tensor(np.ones((4, 4), f32), requires_grad=True)
        self.buffer = np.ones(4, f32)
        self.kept = np.ones((4, 4), f32)
        self.optimizer = tw.optim.Adam([self.w])

    def stale_number(self, x):
        self.calls += 1
        return tw.matmul(x, self.w.data, alpha=float(self.calls))

    def numpy_between(self, x):
        return tw.relu(tw.relu(x) * 2)

    def numpy_in_place(self, x):
        y = tw.relu(x)
        y += 1
        return tw.gelu(y)

    def numpy_state(self, x):
        self.buffer += x[0]
        return tw.relu(self.buffer)

    def numpy_kept_result(self, x):
        return np.add(tw.relu(x), 1, out=self.kept)

    def numpy_gradient(self, x):
        self.w.grad = None
        tw.matmul(np.stack([x, x]), self.w[None]).backward(np.ones((2, 4, 4), f32))

    def numpy_result(self, x):
        return tw.relu(x) + 1

    def rule(self, x):
        return tw.tensor(tw.relu(x)) * 2

    def reads(self, x):
        return tw.relu(x) if tw.Tensor(x).sum() is None or float(Tensor(x[0, 0])) else x

    def number(self, x):
        return float(tw.relu(x)[0, 0])

    def other_ops(self, x):
        self.calls += 1
        return tw.relu(x) if self.calls % 2 else tw.gelu(x)

    def on_tape(self, x):
        return tw.matmul(x, self.w)

    def writes(self, x):
        with tw.no_grad():
            self.w[0] = 3.0
        return tw.relu(x)

    def draws(self, x):
        tw.random.generator()
        return tw.relu(x)

    def two_steps(self, x):
        optimizer = self.optimizer
        self.w.grad = tw.relu(x)
        optimizer.step()
        optimizer.step()

    def sets_the_rate(self, x):
        self.optimizer.lr = 0.1
        return tw.relu(x)

    def options(self, x):
        with tw.options(threads=1):
            return tw.relu(x)

    def view_of_an_argument(self, x):
        return x[1:]


REFUSED = {
    "stale_number": "matmul.* has a number that was another one",
    "numpy_between": "activation.* outside of the registry",
    "numpy_in_place": "other means",
    "numpy_state": "other means|outside of the registry",
    "numpy_kept_result": "outside of the registry",
    "numpy_gradient": "outside of the registry|other means",
    "numpy_result": "outside of the registry",
    "rule": "multiply, which NumPy computes|reading",
    "reads": "reading a value|sum, which NumPy",
    "number": "a number that was read",
    "other_ops": "is activation|number that was another",
    "on_tape": "can still be differentiated",
    "writes": "writing in place",
    "draws": "random draw",
    "two_steps": "second step",
    "sets_the_rate": "learning rate",
    "options": "tw.options is not part",
    "view_of_an_argument": "view of an argument",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    step = tw.compile(getattr(Counting(), name))
    x = np.random.default_rng(1).standard_normal((4, 4)).astype(f32)

    def calls():
        for _ in range(5):
            step(x)

    with pytest.raises(tw.UnsupportedError, match=REFUSED[name]):
        calls()


def test_a_program_that_forgot_the_step_number_is_caught():
    """A test of the tests: without the optimizer's numbers the bits differ."""
    eager, compiled = Classifier(), Classifier()
    step = tw.compile(compiled.step)
    for i in range(3):
        eager.step(*batch(i)), step(*batch(i))
    (program,) = step._programs.values()
    program._varying.clear()
    eager.step(*batch(3)), step(*batch(3))
    assert not same(eager.state(), compiled.state())


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        (object(), tw.DtypeError, "an argument must be an array"),
        (tw.Tensor(np.ones(3, f32), True), tw.UnsupportedError, "must not require a gradient"),
    ],
)
def test_arguments_that_are_refused(argument, error, message):
    with pytest.raises(error, match=message):
        tw.compile(lambda x: None)(argument)


# Errors in a replay -------------------------------------------------------------------------------


def test_an_error_of_a_kernel_leaves_the_program_usable():
    table = np.arange(12, dtype=f32).reshape(4, 3)
    step = tw.compile(lambda ids: tw.relu(tw.embedding(ids, table)))
    good, bad = np.array([3, 0]), np.array([1, 9])
    for _ in range(3):
        step(good)
    for _ in range(2):
        with pytest.raises(tw.ShapeError, match="ids"):
            step(bad)
        assert harness.same_bits(step(good), table[good])


def test_one_call_at_a_time():
    inside, leave = threading.Event(), threading.Event()

    def wait(x):
        inside.set()
        leave.wait(10)
        return tw.relu(x)

    step = tw.compile(wait)
    x = np.ones(3, f32)
    thread = threading.Thread(target=step, args=(x,))
    thread.start()
    inside.wait(10)
    with pytest.raises(RuntimeError, match="another thread"):
        step(x)
    leave.set()
    thread.join()
    assert (step(x) == 1).all()


def test_programs_of_several_threads():
    """Each has its own; the pool goes to one of them at a time."""
    wrong = []

    def work(eager, compiled):
        step = tw.compile(compiled.step)
        for i in range(30):
            a, b = eager.step(*batch(i)), step(*batch(i))
            if not harness.same_bits(a.data, b.data):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(Classifier(), Classifier())) for _ in range(3)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert not wrong


SETUP = textwrap.dedent("""
    import os, signal, threading, time
    import numpy as np, tilewright as tw
    x = np.random.default_rng(0).standard_normal((700, 700), np.float32)
    def step(x):
        y = x
        for _ in range({count}):
            y = tw.matmul(y, x, alpha=0.03)
        return y
    compiled = tw.compile(step)
""")


def run(code):
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_ctrl_c_ends_a_replay():
    print(
        run(
            SETUP.format(count=60)
            + textwrap.dedent("""
        want = step(x)
        for _ in range(3):
            assert (compiled(x) == want).all()
        for _ in range(3):
            timer = threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            try:
                while True:
                    compiled(x)
            except KeyboardInterrupt:
                pass
            timer.join()
            assert (compiled(x) == want).all()
        """)
        )
    )


def test_fork():
    print(
        run(
            SETUP.format(count=3)
            + textwrap.dedent("""
        want = step(x)
        for _ in range(3):
            compiled(x)
        stop = threading.Event()
        def work():
            while not stop.is_set():
                compiled(x)
        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(5):
            child = os.fork()
            if child == 0:
                ok = all((compiled(x) == want).all() for _ in range(3))
                os._exit(0 if ok else 1)
            assert os.waitpid(child, 0)[1] == 0
        stop.set(), thread.join()
        assert (compiled(x) == want).all()
        """)
        )
    )

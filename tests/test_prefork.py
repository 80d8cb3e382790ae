"""Servers: processes forked from one that has already computed, and Python threads side by side."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest

import tilewright as tw


@pytest.fixture
def service(rng):
    """A small model of a request: parallel kernels, int8, attention; the same answer every time."""
    x = rng.standard_normal((300, 257), dtype=np.float32)
    w = rng.standard_normal((257, 400), dtype=np.float32)
    q = rng.standard_normal((1, 4, 130, 32), dtype=np.float32)
    packed = tw.pack(w)

    def answer():
        y = tw.layernorm(tw.matmul(x, packed, activation="gelu"))
        return y.tobytes() + tw.attention(q, q, q, causal=True).tobytes()

    return answer


def serve(answer, want, seconds=0.2):
    """Exit code 0 if every answer within some time is the wanted one."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if answer() != want:
            os._exit(1)
    os._exit(0)


def fork(answer, want):
    pid = os.fork()
    if pid == 0:
        try:
            serve(answer, want)
        finally:
            os._exit(2)
    return pid


def exit_code(pid, seconds=60.0):
    """Of a child that must end by itself; one that hangs is killed and fails the test."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("a forked worker hangs")


def test_prefork_workers_serve_beside_their_parent(service):
    want = service()  # the parent's pool is up before it forks
    workers = [fork(service, want) for _ in range(3)]
    for _ in range(5):
        assert service() == want
    assert [exit_code(pid) for pid in workers] == [0, 0, 0]


def test_a_killed_worker_is_replaced(service):
    want = service()
    victim = fork(service, want)
    time.sleep(0.05)
    os.kill(victim, signal.SIGKILL)
    assert exit_code(victim) == -signal.SIGKILL
    assert exit_code(fork(service, want)) == 0
    assert service() == want


def test_workers_forked_while_threads_compute(service):
    want = service()
    stop = threading.Event()
    wrong = []

    def client():
        while not stop.is_set():
            if service() != want:
                wrong.append(threading.current_thread().name)

    clients = [threading.Thread(target=client) for _ in range(2)]
    for thread in clients:
        thread.start()
    try:
        codes = [exit_code(fork(service, want)) for _ in range(5)]
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    assert codes == [0] * 5
    assert not wrong


def _remote(seed):
    x = np.random.default_rng(seed).standard_normal((129, 65), dtype=np.float32)
    return tw.matmul(x, x.T).tobytes()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_multiprocessing_pools(method):
    with multiprocessing.get_context(method).Pool(2) as pool:
        answers = pool.map_async(_remote, range(4)).get(timeout=60)  # a dead worker's never comes
    assert answers == [_remote(seed) for seed in range(4)]

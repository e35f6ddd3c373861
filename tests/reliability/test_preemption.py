"""T03: the first signal asks, the second one ends at once, and the handlers of before come back."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from mmrlhf.train.preempt import Preempted, Preemption


def in_child(work) -> int:
    """The wait status of a forked process that runs `work`."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except SystemExit as stop:
            os._exit(stop.code)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_first_signal_is_noted_and_becomes_the_exit_code(signum, code):
    with Preemption() as preemption:
        preemption.check()
        os.kill(os.getpid(), signum)
        time.sleep(0.01)
        assert preemption.requested == signum
        with pytest.raises(Preempted) as stop:
            preemption.check()
        assert stop.value.code == code
        assert str(stop.value) == f"stopped by {signal.Signals(signum).name}", "nothing was saved"
        with pytest.raises(Preempted, match=r"stopped by SIG[A-Z]+ after saving$"):
            preemption.check(saved=True)


def test_second_signal_kills_at_once_even_in_a_busy_process():
    def work():
        with Preemption():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    started = time.monotonic()
    status = in_child(work)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("signalled", [False, True])
def test_handlers_are_restored(signalled):
    def mine(signum, frame):
        raise AssertionError("not called")

    before = {signum: signal.signal(signum, mine) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        with Preemption():
            assert signal.getsignal(signal.SIGTERM) is not mine
            if signalled:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_outside_the_main_thread_nothing_is_installed():
    found = []

    def work():
        with Preemption() as preemption:
            found.append((preemption.installed, preemption.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, None)]

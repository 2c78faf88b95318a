"""A foreign program's run, bounded in time and memory: the chat template that came with a tokenizer."""

import ctypes
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# A chat template takes milliseconds and kilobytes.
SECONDS = 10.0
BYTES = 512 << 20


class TooLong(Exception):
    """What runs was stopped at its bound of time."""

    def __init__(self) -> None:
        super().__init__("it runs too long")


@contextmanager
def bounded(seconds: float = SECONDS, growth: int = BYTES) -> Iterator[None]:
    """Stop Python code that runs too long or takes too much memory; threads wait for one another.

    Args:
        seconds: after which :class:`TooLong` is raised in it, at its next instruction.
        growth: bytes beyond what the process has mapped; an allocation that exceeds it is a ``MemoryError``.
            On Linux alone, and meanwhile for other threads too: keep what runs short.

    Raises:
        TooLong: the time was over.
        MemoryError: the memory was.
    """
    with _WATCHDOG.turn:
        _WATCHDOG.wake()  # before memory is bounded: a thread's stack is memory
        before = _map_at_most(growth)
        bound = _Bound(threading.get_ident(), time.monotonic() + seconds)
        try:
            try:
                _WATCHDOG.begin(bound)
                yield
            finally:
                _WATCHDOG.end(bound)
        finally:  # after its end: an interruption here would leave the limit as it is
            _map_at_most_again(before)


class _Bound:
    """One run's bound of time: whose it is, when it is over, whether it was."""

    def __init__(self, thread: int, deadline: float) -> None:
        self.thread, self.deadline, self.over = thread, deadline, False

    def interrupt(self) -> None:
        what = ctypes.py_object(TooLong)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), what)


class _Watchdog:
    """One thread a process, which sees to the one bound there is: a thread a bound would cost more than it.

    It is woken only for a bound that is over before it would look next.
    """

    def __init__(self) -> None:
        # The bound of memory is the process's: two at once would put back one another's.
        self.turn = threading.Lock()
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.bound: _Bound | None = None
        self.looks_at = math.inf
        self.awake = False

    def wake(self) -> None:
        if not self.awake:
            threading.Thread(target=self.watch, name="bounded", daemon=True).start()
            self.awake = True

    def begin(self, bound: _Bound) -> None:
        with self.lock:
            self.bound = bound
            if bound.deadline < self.looks_at:
                self.changed.notify()

    def end(self, bound: _Bound) -> None:
        with self.lock:
            self.bound = None
        if bound.over:
            # One that came too late must not hit what follows: it ends here. Taken back by NULL it would
            # leave Python 3.11 an interruption without an exception, on which profilers hang.
            with suppress(TooLong):
                bound.interrupt()
                while True:
                    pass

    def watch(self) -> None:
        with self.lock:
            while True:
                left = self.bound.deadline - time.monotonic() if self.bound else math.inf
                if self.bound and left <= 0:
                    self.bound.over = True
                    self.bound.interrupt()
                    self.bound = None
                    continue
                self.looks_at = self.bound.deadline if self.bound else math.inf
                self.changed.wait(left if self.bound else None)


_WATCHDOG = _Watchdog()
if hasattr(
    os, "register_at_fork"
):  # a child has neither the thread nor who would release the locks
    os.register_at_fork(after_in_child=_WATCHDOG.__init__)


def _map_at_most(growth: int) -> tuple[int, int] | None:
    """Let the process map so many more bytes; its limits before, None where there are none to set."""
    try:
        import resource

        with open("/proc/self/statm", "rb", buffering=0) as statm:
            mapped = int(statm.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard, mapped + growth) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    return soft, hard


def _map_at_most_again(before: tuple[int, int] | None) -> None:
    """Put the limits back."""
    if before is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, before)

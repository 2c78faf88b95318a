"""A foreign program's run, bounded in time and memory: the chat template that came with a tokenizer."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A chat template takes milliseconds and kilobytes.
SECONDS = 10.0
BYTES = 512 << 20
# The bound of memory is the process's: two at once would put back one another's.
_ONE_AT_A_TIME = threading.Lock()


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
    thread, lock, running = threading.get_ident(), threading.Lock(), [True]

    def interrupt() -> None:
        what = ctypes.py_object(TooLong)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), what)

    def stop() -> None:
        with lock:
            if running:
                running.clear()
                interrupt()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    with _ONE_AT_A_TIME:
        timer.start()
        try:
            with _mapped_at_most(growth):
                yield
        finally:
            timer.cancel()
            with lock:
                was_stopped = not running
                running.clear()
            if was_stopped:
                # One that came too late must not hit what follows: it ends here. Taken back by NULL it would
                # leave Python 3.11 an interruption without an exception, on which profilers hang.
                with suppress(TooLong):
                    interrupt()
                    while True:
                        pass


@contextmanager
def _mapped_at_most(growth: int) -> Iterator[None]:
    try:
        import resource

        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard, mapped + growth) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

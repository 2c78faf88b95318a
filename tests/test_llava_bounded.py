"""A foreign chat template's bounds: they end with what they bound, and leave nothing behind."""

import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
from llava_helpers import tiny_language_tokenizer

from llava_ext import bounded as bounded_module
from llava_ext import conversation
from llava_ext.bounded import TooLong, bounded
from llava_ext.conversation import Turn
from llava_ext.templates import render

CHAT = [Turn("user", "What?"), Turn("assistant", "This."), Turn("user", "And?")]


def test_bounds_end_with_what_they_bound() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    for _ in range(50):  # now and then the time is over just when it ends
        with suppress(TooLong), bounded(seconds=0.001):
            time.sleep(0.001)
    with pytest.raises(MemoryError), bounded(growth=1 << 20):
        bytearray(1 << 30)
    time.sleep(0.01)
    assert resource.getrlimit(resource.RLIMIT_AS) == before

    def overlap(seconds: float) -> None:
        with bounded():
            time.sleep(seconds)

    # The second would begin in the first's bounds and end after it.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(overlap, (0.05, 0.1)))
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytearray(1 << 30)) == 1 << 30


def test_a_profiler_goes_on_after_a_bound() -> None:
    # A process of its own: the interpreter would wait for ever.
    code = f"""
import cProfile, runpy, time
found = runpy.run_path({bounded_module.__file__!r})
bounded, late = found["bounded"], found["TooLong"]
def once(seconds):
    try:
        with bounded(seconds):
            while seconds < 1:
                time.sleep(0.001)
    except late:
        return 1
    return 0
def all_of():
    return [once(seconds) for seconds in (10, 10, 0.0001, 10, 0.0001, 10)]
print(cProfile.Profile().runcall(all_of))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout.strip() == "[0, 0, 1, 0, 1, 0]", ran.stderr


def test_bounds_share_one_thread_and_a_forked_child_has_its_own() -> None:
    with bounded():
        before = threading.enumerate()
    with bounded():
        assert threading.enumerate() == before

    # Forked while another thread's bound is on, a child has neither that thread nor the one that watches.
    code = f"""
import os, runpy, threading, time
found = runpy.run_path({bounded_module.__file__!r})
bounded, late = found["bounded"], found["TooLong"]
inside, forked = threading.Event(), threading.Event()
def other():
    with bounded():
        inside.set()
        forked.wait()
thread = threading.Thread(target=other)
thread.start()
inside.wait()
child = os.fork()
if not child:
    try:
        with bounded(0.01):
            while True:
                pass
    except late:
        os._exit(7)
forked.set()
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert ran.stdout.strip() == "7", ran.stderr


def test_a_template_runs_under_one_bound_a_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    @contextmanager
    def counted() -> Iterator[None]:
        begun.append(True)
        yield

    monkeypatch.setattr(conversation, "bounded", counted)
    segments = render("tokenizer", CHAT, "Be brief.", tiny_language_tokenizer())
    assert len(begun) == 1 and any(segment.learned for segment in segments)

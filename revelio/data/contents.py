"""What pictures hold, as short hashes: caches and resumed runs are tied to contents, not to names alone.

A digest is of the stored bytes, not of pixels: the size, and four windows of 64 KiB spread over the file
(all of it, up to 256 KiB). It is the same on every machine; no time stamp enters.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

WINDOW = 1 << 16
WINDOWS = 4
UNREADABLE = "unreadable"


def digest_of(source: bytes | Path) -> str:
    """The digest of a picture's stored bytes; ``unreadable`` where there is no file that can be read."""
    if isinstance(source, bytes):
        return _digest(len(source), lambda start, stop: source[start:stop])
    try:
        if not stat.S_ISREG(source.stat().st_mode):
            return UNREADABLE
        with source.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            return _digest(size, partial(_window, file.fileno()))
    except (OSError, ValueError):
        return UNREADABLE


def digests(
    digest: Callable[[int], str], count: int, progress: Callable[[int], object] | None = None
) -> list[str]:
    """The digests of images ``0..count-1``; files are read by several threads.

    Args:
        digest: gives one.
        count: how many.
        progress: told 1 after each.
    """
    found: list[str] = []
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        for one in pool.map(digest, range(count), chunksize=64):
            found.append(one)
            if progress is not None:
                progress(1)
    return found


def combined(parts: Iterable[str]) -> str:
    """One hash for digests in their order: sha256, in hexadecimal."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _window(number: int, start: int, stop: int) -> bytes:
    return os.pread(number, stop - start, start)


def _digest(size: int, read: Callable[[int, int], bytes]) -> str:
    found = hashlib.blake2b(f"{size}:".encode(), digest_size=16)
    if size <= WINDOW * WINDOWS:
        spans = [(0, size)]
    else:
        starts = [(size - WINDOW) * place // (WINDOWS - 1) for place in range(WINDOWS)]
        spans = [(start, start + WINDOW) for start in starts]
    for start, stop in spans:
        found.update(read(start, stop))
    return found.hexdigest()

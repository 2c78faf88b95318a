"""Random generators keyed by what they are for, so that nothing depends on order, batch or worker.

``generator(seed, "noise", image_id, timestep, draw)`` gives the same stream wherever and whenever it is
asked for. No global random state is read or written anywhere in Revelio.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def key_seed(*key: str | int) -> int:
    """A 63-bit seed from a key: equal keys give equal seeds on every machine and version.

    The parts are typed and length-prefixed, so that ("ab", "c"), ("a", "bc") and ("1",), (1,) differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in key:
        # A file name that is not UTF-8 counts by its bytes.
        text = str(part).encode(errors="surrogateescape")
        digest.update(f"{type(part).__name__}:{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest(), "big") >> 1


def generator(*key: str | int) -> "torch.Generator":
    """A CPU generator seeded by ``key``; draw on the CPU and move, so that devices agree."""
    import torch

    return torch.Generator().manual_seed(key_seed(*key))


@contextmanager
def lent(seed: int) -> Iterator[None]:
    """Lend PyTorch's global CPU generator a seed: layers on the CPU draw their first weights from it.

    Of GPUs nothing is read or seeded, as ``torch.random.fork_rng()`` and ``torch.manual_seed`` do of all
    there are: each would be started, which takes half a gigabyte of it.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield

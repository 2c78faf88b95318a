import hashlib
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from revelio.seeds import generator, key_seed, lent

ROOT = Path(__file__).parent.parent

keys = st.lists(st.text(max_size=4) | st.integers(), min_size=1, max_size=4).map(tuple)


@given(keys, keys)
def test_different_keys_give_different_seeds(one: tuple, other: tuple) -> None:
    same = [(type(part), part) for part in one] == [(type(part), part) for part in other]
    assert (key_seed(*one) == key_seed(*other)) == same


def test_the_seed_is_the_documented_hash() -> None:
    digest = hashlib.blake2b(b"str:5:noiseint:2:25", digest_size=8).digest()
    assert key_seed("noise", 25) == int.from_bytes(digest, "big") // 2


def test_generators_are_independent_of_global_state() -> None:
    torch.manual_seed(1)
    first = torch.randn(4, generator=generator(0, "noise", "a.jpg", 25, 0))
    torch.manual_seed(2)
    again = torch.randn(4, generator=generator(0, "noise", "a.jpg", 25, 0))
    other = torch.randn(4, generator=generator(0, "noise", "b.jpg", 25, 0))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_lent_seed_is_the_cpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with two GPUs, neither of which may be started."""

    def started(*_: object) -> None:
        raise AssertionError("a GPU was asked for its state, or given a seed")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, started)
    before = torch.get_rng_state()
    with lent(7):
        drawn = torch.randn(5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, torch.randn(5, generator=torch.Generator().manual_seed(7)))


def test_nothing_else_lends_or_seeds_the_global_state() -> None:
    """But Diff-C's dropout, which draws on the device that it is on, and on no other."""
    rooms = {"revelio/seeds.py", "revelio/diffc/train.py"}
    places = [
        path for part in ("revelio", "llava_ext", "eval") for path in (ROOT / part).rglob("*.py")
    ]
    texts = {
        str(path.relative_to(ROOT)): path.read_text()
        for path in [*places, ROOT / "tools/mini/judge.py"]
    }
    assert {name for name, text in texts.items() if "fork_rng(" in text} == rooms
    assert not [name for name, text in texts.items() if re.search(r"torch\.manual_seed\(", text)]

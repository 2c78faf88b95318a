import hashlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from revelio.seeds import generator, key_seed

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

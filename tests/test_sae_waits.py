"""A k-SAE's step on a pretended device: where its host waits, and that not waiting changes no number."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sae_helpers import planted
from sae_reference_kernel import ReferenceKernel
from torch import Tensor
from waits_helpers import PretendedCuda

from revelio.sae.config import TrainConfig
from revelio.sae.model import KSparseAutoencoder
from revelio.sae.state import TrainState
from revelio.sae.step import train_step
from revelio.sae.train import begin, train

ROWS, BATCH = 192, 64
# How much there is to compute, by what asks for it: named in `revelio.sae.step`.
LOOK = "revelio/sae/activations.py:_asked tolist"
WIDTHS = "revelio/sae/matryoshka.py:of tolist"
AUXK = {"auxk": 8, "dead_after": 64}
WAITS: list[tuple[dict[str, Any], dict[str, int]]] = [
    ({"mode": "fixed"}, {}),
    ({"mode": "as_paper"}, {}),
    ({"mode": "as_code"}, {}),
    (AUXK, {}),
    ({"mode": "as_paper", **AUXK}, {}),
    ({"prefixes": (32, 64)}, {WIDTHS: 1}),
    ({"prefixes": (32, 64), **AUXK}, {WIDTHS: 1}),
    ({"activation": "batch-topk"}, {LOOK: 1}),
    ({"activation": "batch-topk", **AUXK}, {LOOK: 1}),
    ({"activation": "jumprelu"}, {LOOK: 1}),
    ({"activation": "jumprelu", "prefixes": (32, 64), **AUXK}, {LOOK: 1, WIDTHS: 1}),
]  # fmt: skip


def made(changes: dict[str, Any]) -> tuple[KSparseAutoencoder, TrainConfig, Tensor]:
    own = {name: changes[name] for name in AUXK if name in changes}
    model = KSparseAutoencoder(24, 128, 4, **{n: v for n, v in changes.items() if n not in own})
    rows, _ = planted(ROWS, 24, 40, 4, noise=0.05)
    return model, TrainConfig(steps=12, batch_size=BATCH, warmup_steps=3, **own), rows


class All:
    """All rows once an epoch, in their order."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def epoch(self, index: int) -> Iterator[Tensor]:
        """The batches."""
        yield from self.rows.split(BATCH)


class Looks(ReferenceKernel):
    """Counts how often it is asked for codes."""

    looks = 0

    def encode(self, *given: Any, **named: Any) -> Any:
        """See :class:`ReferenceKernel`."""
        self.looks += 1
        return super().encode(*given, **named)


def on_device(
    changes: dict[str, Any],
) -> tuple[KSparseAutoencoder, TrainState, list[Any], list[Any]]:
    """A training whose steps are taken on the pretended device: its numbers, and the waits of each step.

    Of those for codes that were looked for several times, one is left: one a look is what there may be.
    """
    model, config, rows = made(changes)
    state, device = begin(model, All(rows), config), PretendedCuda()
    device.take([model, state])
    numbers, waits = [], []
    for t in range(config.steps):
        batch, kernel = device.take(rows.split(BATCH)[t % (ROWS // BATCH)].clone()), Looks()
        with device.used():
            step = train_step(model, batch, config, state, kernel)
        found = Counter(device.waits)
        found[LOOK] -= kernel.looks - 1
        waits.append(+found)
        numbers.append(step.numbers.tolist())
        device.waits.clear()
    return model, state, numbers, waits


@pytest.mark.parametrize(("changes", "waits"), WAITS, ids=lambda each: str(each)[:60])
def test_a_step_waits_for_what_the_docstring_says(changes: dict, waits: dict) -> None:
    model, state, numbers, found = on_device(changes)
    assert found == [waits] * len(numbers)
    # The same training on a CPU, which may ask as often as it likes: the same bits.
    other, config, rows = made(changes)
    steps = list(train(other, All(rows), config, kernel=ReferenceKernel()))
    np.testing.assert_array_equal([step.numbers.tolist() for step in steps], numbers)
    for name, wanted in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], wanted), name
    assert torch.equal(state.moments.last, steps[-1].state.moments.last)
    if "auxk" in changes:
        assert any(step.auxk_loss > 0 for step in steps)


def test_the_pretended_device_tells_of_every_kind_of_wait() -> None:
    """Each of these waits on a GPU: what PyTorch's sync debug mode warns of."""
    from revelio.backbones import hooks  # a file whose code counts as ours

    places = {
        "float(x.sum())": "_local_scalar_dense",
        "x.tolist()": "tolist",
        "bool((x > 0).all())": "_local_scalar_dense",
        "x[x > 1]": "index by a mask",
        "x.nonzero()": "nonzero",
        "x.masked_select(x > 1)": "masked_select",
        "x.unique()": "_unique2",
        "x[[0, 1]]": "index by places of the host",
        "x[torch.tensor([0, 1])]": "index by places of the host",
        "x.cpu()": "copy from the device",
        "x.to('cpu')": "copy from the device",
        "torch.ones(3).to(x.device)": "copy to the device",
        "torch.tensor([1.0], device=x.device)": "torch.tensor of the host's values",
        "x.new_tensor([1.0])": "new_tensor of the host's values",
    }
    silent = (
        "x + 1",
        "x.sort()",
        "x.topk(2)",
        "torch.where(x > 1, x, 0)",
        "x[0]",
        "x.clone()",
        "len(x)",
    )
    silent += (
        "torch.ones(3).to(x.device, non_blocking=True)",
        "torch.ones(3, device=x.device) * x[:3]",
    )
    device = PretendedCuda()
    x = device.take(torch.arange(6.0))
    for code, said in (*places.items(), *((each, "") for each in silent)):
        device.waits.clear()
        with device.used():
            assert x.is_cuda and x.device.type == "cuda" and x.sum().is_cuda
            eval(compile(code, hooks.__file__, "eval"), {"x": x, "torch": torch})
        assert [wait.split(" ", 1)[1] for wait in device.waits] == [said][: bool(said)], code
    with device.used(), pytest.raises(RuntimeError, match="of the device and of the host"):
        torch.add(x, torch.ones(6))
    assert not x.is_cuda

"""Commands on a card that is pretended: no tensor of the host meets one of the device.

On a machine without a GPU nothing else shows such a fault, which ends a command at once where there is one.
"""

from pathlib import Path

import pytest
import torch
from cli_helpers import commands, run_words, write_inputs
from waits_helpers import pretended_card

pytestmark = [
    pytest.mark.filterwarnings("ignore:kernel. PyTorch"),  # Triton may not be there
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore:.*Setting accelerator to CPU"),
]

# Whose device is `auto`, or is given.
AUTO = (
    *("extract", "pca-maps", "zero-shot", "extract-text", "concept", "steer", "steer-eval"),
    *(
        "gallery",
        "train-ksae",
        "train-diffc",
        "eval-diffc",
        "top-images",
        "locality",
        "name-latents",
    ),
    *("llava cache", "llava pretrain", "llava finetune", "llava tokens"),
)
GIVEN = ("llava explain", "llava-bench answer", "mmvp")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("name", [*AUTO, *GIVEN])
def test_a_command_keeps_to_its_device(
    name: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = commands(made)[name](tmp_path / "out")
    if name in GIVEN:
        words[words.index("--device") + 1] = "cuda"
    with pretended_card(monkeypatch) as card:
        run_words(words)
    assert card.taken  # it was there
    assert any((tmp_path).iterdir())


def test_what_meets_on_both_sides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_card(monkeypatch):
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert there.is_cuda and (there.cpu() + here).sum() == 6
        assert (there.to(here) + here).device.type == "cpu"
        with pytest.raises(RuntimeError, match="tensors of the device and of the host"):
            here + there

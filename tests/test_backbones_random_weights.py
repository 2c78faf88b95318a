
import pytest
import torch
from backbones_helpers import tiny_sd
from torch import nn

from revelio.backbones.random_weights import load_random_backbone, randomise
from revelio.backbones.registry import load_backbone
from revelio.backbones.stable_diffusion import StableDiffusionBackbone


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny_sd(folder)
    return str(folder)


def test_only_the_unet_is_drawn_anew(model: str) -> None:
    trained = load_backbone(model)
    random = load_random_backbone(model, 3)
    assert isinstance(trained, StableDiffusionBackbone)
    assert isinstance(random, StableDiffusionBackbone)
    for old, new in zip(trained.unet.parameters(), random.unet.parameters(), strict=True):
        # Norms start at one and biases of norms at zero, in both; everything else differs.
        assert not torch.equal(old, new) or torch.all((new == 1) | (new == 0))
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(trained.encode(pixels), random.encode(pixels))
    assert torch.equal(trained.text.embed(["a shoe"]), random.text.embed(["a shoe"]))


def test_the_seed_decides_and_the_global_state_stays() -> None:
    def drawn(seed: int) -> torch.Tensor:
        network = nn.Linear(4, 4)
        randomise(network, seed)
        return network.weight.detach().clone()

    before = torch.get_rng_state()
    network = nn.Linear(4, 4)
    after_making = torch.get_rng_state()
    randomise(network, 0)
    assert torch.equal(torch.get_rng_state(), after_making)
    torch.set_rng_state(before)
    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    # torch's own first weights of a linear layer are uniform in +-1/sqrt(fan in).
    assert drawn(1).abs().max() <= 0.5

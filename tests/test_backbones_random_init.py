import pytest
import torch
from backbones_helpers import tiny_sd
from waits_helpers import PretendedCuda

from revelio.backbones.diffusion.sd import StableDiffusionBackbone
from revelio.backbones.random_init import load_random_backbone, untrained
from revelio.backbones.registry import load_backbone


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


def test_the_seed_decides_and_the_global_state_stays(model: str) -> None:
    def drawn(seed: int) -> torch.Tensor:
        backbone = load_random_backbone(model, seed)
        assert isinstance(backbone, StableDiffusionBackbone)
        return next(backbone.unet.parameters()).detach().clone()

    backbone = load_backbone(model)
    before = torch.get_rng_state()
    untrained(backbone, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert backbone.name.endswith("(random weights 0)")
    first = drawn(1)
    assert torch.equal(first, drawn(1)) and not torch.equal(first, drawn(2))
    # torch's own first weights of a convolution are uniform in +-1/sqrt(fan in): 4 channels x 3 x 3.
    assert 0.9 / 6 < first.abs().max() <= 1 / 6


def test_weights_are_drawn_on_the_cpu_whatever_the_device(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's generator would draw others of the same seed."""
    wanted, backbone, device = load_random_backbone(model, 3), load_backbone(model), PretendedCuda()
    assert isinstance(wanted, StableDiffusionBackbone)
    assert isinstance(backbone, StableDiffusionBackbone)
    device.take(backbone.unet)
    drawn, reset = [], torch.nn.Conv2d.reset_parameters

    def watched(layer: torch.nn.Conv2d) -> None:
        drawn.append(layer.weight.is_cuda)
        reset(layer)

    monkeypatch.setattr(torch.nn.Conv2d, "reset_parameters", watched)
    with device.used():
        untrained(backbone, 3)
        assert all(parameter.is_cuda for parameter in backbone.unet.parameters())
    assert drawn and not any(drawn)
    for one, other in zip(wanted.unet.parameters(), backbone.unet.parameters(), strict=True):
        assert torch.equal(one, other)

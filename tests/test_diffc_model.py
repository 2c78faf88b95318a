import json

import pytest
import torch
import torch.nn.functional as F

from revelio.diffc.model import DiffC, head_macs, load_diffc


@pytest.mark.parametrize(
    ("channels", "classes", "width", "count"),
    [
        (1280, 37, 1024, 40_158_245),  # SPEC 2.3
        (640, 37, 1024, 40_158_245 - 640 * 1024 * 9),
        (128, 10, 32, 32 * 128 * 9 + 3 * 32 * 32 * 9 + 4 * 3 * 32 + 33 * 10),
    ],
)
def test_parameter_count(channels: int, classes: int, width: int, count: int) -> None:
    assert DiffC(channels, classes, width).parameter_count() == count


def by_formula(model: DiffC, x: torch.Tensor) -> torch.Tensor:
    """Evaluation mode written out, parameters by name."""
    w = model.state_dict()

    def norm(z: torch.Tensor, name: str, affine: bool) -> torch.Tensor:
        shape = (1, -1, 1, 1)
        mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        z = (z - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        if affine:
            z = z * w[f"{name}.weight"].view(shape) + w[f"{name}.bias"].view(shape)
        return z

    z = norm(x, "norm", False)
    for block, stride in enumerate((1, 2, 2, 2)):
        z = F.conv2d(z, w[f"blocks.{block}.0.weight"], w[f"blocks.{block}.0.bias"], stride, 1)
        z = norm(z, f"blocks.{block}.1", True).clamp_min(0)
    return z.sum(dim=(2, 3)) / (z.shape[2] * z.shape[3]) @ w["head.weight"].T + w["head.bias"]


def test_forward_is_the_formula() -> None:
    model = DiffC(5, 3, width=7)
    for _ in range(3):
        model(torch.randn(8, 5, 9, 6) * 4 + 2)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".1." in name:
                value.add_(torch.rand_like(value))
    model.eval()
    x = torch.randn(4, 5, 9, 6)
    torch.testing.assert_close(model(x), by_formula(model, x), atol=1e-5, rtol=1e-5)


def test_training_mode_normalises_by_the_batch() -> None:
    model = DiffC(5, 3, width=7)
    x = torch.randn(8, 5, 4, 4)
    scale, shift = torch.rand(1, 5, 1, 1) * 9 + 1, torch.randn(1, 5, 1, 1) * 50
    torch.testing.assert_close(model(x), model(x * scale + shift), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("side", [1, 2, 3, 7, 8, 16])
def test_any_grid_size(side: int) -> None:
    model = DiffC(4, 2, width=8)
    logits = model(torch.randn(3, 4, side, side + 1))
    logits.sum().backward()
    assert logits.shape == (3, 2)


def test_multiply_adds_are_counted_as_the_convolutions_run() -> None:
    model, total = DiffC(4, 2, width=8), 0

    def count(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(module, torch.nn.Conv2d)
        total += module.weight.numel() * output.shape[2] * output.shape[3]

    for block in model.blocks:
        block[0].register_forward_hook(count)
    model(torch.randn(2, 4, 9, 5))
    assert head_macs((4, 9, 5), 8) == total
    assert head_macs((1280, 32, 32), 1024) == pytest.approx(15.3e9, rel=0.01)  # SPEC 6


def test_initial_weights_are_pytorchs_distribution_and_keyed() -> None:
    before = torch.random.get_rng_state()
    one, same, other = DiffC(64, 5, 32, seed=1), DiffC(64, 5, 32, seed=1), DiffC(64, 5, 32, seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    weight = one.blocks[0][0].weight.detach()
    assert torch.equal(weight, same.blocks[0][0].weight)
    assert not torch.equal(weight, other.blocks[0][0].weight)
    default = torch.nn.Conv2d(64, 32, 3)
    assert weight.abs().max().item() == pytest.approx(default.weight.abs().max().item(), rel=0.01)
    assert weight.std().item() == pytest.approx(default.weight.std().item(), rel=0.03)


def test_wrong_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 channels was given \(2, 3, 8, 8\)"):
        DiffC(4, 2, width=8)(torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 0}, "classes = 0"),
        ({"width": 0}, "width = 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"class_names": ["a"]}, "1 class name for 2 classes"),
        ({"class_names": ["a", 3]}, "must be a list of texts"),
        ({"class_names": ["a", ["b"]]}, "must be a list of texts"),
        ({"class_names": "ab"}, "must be a list of texts"),
        ({"format": 9}, "format 9"),
    ],
)
def test_wrong_settings(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffC(**({"channels": 4, "classes": 2, "width": 8} | change))


def test_saved_and_read_back(tmp_path) -> None:
    model = DiffC(4, 2, width=8, class_names=["cat", "dog"], grids={"layer": "up_ft1"}, seed=3)
    model(torch.randn(6, 4, 3, 3))
    model.eval().save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["format"] == 1
    again = load_diffc(tmp_path / "m")
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(again(x), model(x))
    assert again.class_names == ("cat", "dog")
    assert again.grids == {"layer": "up_ft1"}


def test_reading_what_is_no_classifier(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_diffc(tmp_path)
    with pytest.raises(ValueError, match="no Diff-C at"):
        load_diffc(tmp_path / "nowhere" / "at" / "all")
    model = DiffC(4, 2, width=8)
    model.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"width": 16}))
    with pytest.raises(ValueError, match="are not those of model"):
        load_diffc(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"format": 2}))
    with pytest.raises(ValueError, match="format 2"):
        load_diffc(tmp_path / "m")

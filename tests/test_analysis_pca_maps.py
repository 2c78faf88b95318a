import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from revelio.analysis.pca_maps import PcaFit, pca_maps, sheet, side_by_side
from revelio.data.transforms import Crop


def planted(b=5, c=7, h=4, w=6):
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([5.0, 3.0, 2.0] + [0.1] * (c - 3))
    mixing = torch.linalg.qr(torch.randn(c, c, generator=generator)).Q
    cells = torch.randn(b, h, w, c, generator=generator) * scale @ mixing.T + 4
    return cells.movedim(-1, 1)


def test_components_equal_scikit_learns_up_to_the_fixed_sign():
    grids = planted()
    cells = grids.movedim(1, -1).reshape(-1, 7).numpy()
    reference = PCA(n_components=3).fit(cells)
    maps = pca_maps(grids)
    for ours, theirs in zip(maps.components.numpy(), reference.components_, strict=True):
        theirs = theirs * np.sign(theirs[np.abs(theirs).argmax()])
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        assert ours[np.abs(ours).argmax()] > 0
    np.testing.assert_allclose(maps.explained, reference.explained_variance_ratio_, rtol=1e-4)
    np.testing.assert_allclose(maps.mean, cells.mean(0), rtol=1e-4)


def test_scaling_is_common_to_the_set_and_clips_one_percent():
    grids = planted(b=20)
    maps = pca_maps(grids)
    projected = torch.einsum("bchw,kc->bkhw", grids - maps.mean[:, None, None], maps.components)
    span = (maps.high - maps.low)[:, None, None]
    expected = ((projected - maps.low[:, None, None]) / span).clamp(0, 1)
    assert torch.allclose(maps.rgb, expected, atol=1e-4)
    for component in maps.rgb.movedim(1, 0).flatten(1):
        assert float((component == 0).float().mean()) == pytest.approx(0.01, abs=0.006)
        assert float((component == 1).float().mean()) == pytest.approx(0.01, abs=0.006)


def test_streaming_equals_one_go():
    grids = planted(b=9)
    one, many = PcaFit(7), PcaFit(7)
    one.add(grids)
    for part in grids.split(2):
        many.add(part)
    for a, b in zip(one.components(), many.components(), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_few_channels_and_constant_grids_are_drawn():
    two = pca_maps(torch.randn(2, 2, 3, 3))
    assert two.components.shape == (3, 2)
    assert not two.components[2].any()
    assert (two.rgb[:, 2] == 0.5).all()
    assert (pca_maps(torch.ones(1, 4, 2, 2)).rgb == 0.5).all()
    with pytest.raises(ValueError, match="at least two"):
        pca_maps(torch.ones(1, 4, 1, 1))
    with pytest.raises(ValueError, match="take grids"):
        pca_maps(torch.ones(4, 3))


def test_sheet_places_maps_beside_their_images():
    images = [Image.new("RGB", (40, 20), "red"), Image.new("RGB", (20, 40), "blue")]
    maps = torch.zeros(2, 3, 2, 2)
    maps[1, 1] = 1
    page = sheet(images, [("up_ft1 t=25", maps)], side=64)
    row = [page.height - 4 - 34, page.height - 4 - 2 * 68 + 34]
    middle = 4 + 32
    assert page.getpixel((middle, row[0])) == (0, 0, 255)
    assert page.getpixel((middle, row[1])) == (255, 0, 0)
    assert page.getpixel((middle + 68, row[0])) == (0, 255, 0)
    assert page.getpixel((middle + 68, row[1])) == (0, 0, 0)


def test_sheet_shows_the_square_that_the_maps_are_of():
    # Green with a red frame that the model cuts off.
    image = Image.new("RGB", (80, 40), "red")
    image.paste(Image.new("RGB", (32, 32), (0, 255, 0)), (24, 4))
    page = sheet([image], [("up", torch.zeros(1, 3, 2, 2))], side=64, crop=Crop(16, 20))
    seen = np.asarray(page.crop((4, page.height - 72, 68, page.height - 8)))
    assert (seen == (0, 255, 0)).all()
    both = np.asarray(side_by_side([page, page]))
    assert (both[:, : page.width] == both[:, page.width :]).all() and len(both) == page.height

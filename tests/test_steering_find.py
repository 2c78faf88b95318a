"""A planted concept in a planted dictionary is found, and ablating it removes it and nothing else."""

import pytest
import torch
from steering_helpers import draw, sd

from revelio.backbones.diffusion.pipeline_layers import PipelineLayers
from revelio.backbones.hooks import edit, hooked
from revelio.sae.model import KSparseAutoencoder
from revelio.steering.concept import all_codes, from_rows
from revelio.steering.edits import Edit, LatentChange
from revelio.steering.find import find_latents, prompt_codes
from revelio.steering.steer import edited

D = 12
PLANTED = (3, 8)


@pytest.fixture
def dictionary() -> KSparseAutoencoder:
    """Twelve orthonormal directions: codes are exact, and what is 0 but for rounding does not fire."""
    model = KSparseAutoencoder(D, D, 4, seed=None)
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0))).Q
    model.W_dec.data.copy_(basis)
    model.W_enc.data.copy_(basis)
    model.b_enc.data.fill_(-1e-5)
    return model.eval()


def planted(model: KSparseAutoencoder, rows: int, seed: int, *, inside: bool) -> torch.Tensor:
    """Rows of two random latents outside the planted ones; inside, the planted ones fire too."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.zeros(rows, D)
    others = [latent for latent in range(D) if latent not in PLANTED]
    for row in range(rows):
        for pick in torch.randperm(len(others), generator=draw)[:2].tolist():
            codes[row, others[pick]] = 1 + float(torch.rand(1, generator=draw))
        if inside:
            codes[row, list(PLANTED)] = 2.0
    return codes @ model.W_dec.detach()


def test_a_planted_concept_is_found_and_held_out_rows_agree(dictionary):
    sets = [
        all_codes(dictionary, planted(dictionary, 40, seed, inside=inside), "sparse")
        for seed, inside in ((1, True), (2, False))
    ]
    found = find_latents(*sets, count=5, specificity=0.9)
    assert set(found.latents) == set(PLANTED)
    assert found.auc == 1.0
    assert all(row["rate"] == 1.0 and row["rate_outside"] == 0.0 for row in found.held_out)
    assert sum(auc > 0.9 for auc in found.shuffled) == 0
    with pytest.raises(ValueError, match=r"no latent fires inside with a specificity of 0.9"):
        find_latents(sets[1][:20], sets[1][20:], specificity=0.9, count=3)
    with pytest.raises(ValueError, match="sets of 1 and 40"):
        find_latents(sets[0][:1], sets[1])


def test_the_contrast_of_the_two_sets_is_the_planted_direction(dictionary):
    rows = [
        planted(dictionary, 400, seed, inside=inside) for seed, inside in ((1, True), (2, False))
    ]
    vector = from_rows("m", "l", dictionary, *rows, codes="sparse").vector[0]
    direction = dictionary.W_dec[list(PLANTED)].sum(dim=0).detach()
    assert torch.cosine_similarity(vector, direction, dim=0) > 0.99


def test_ablating_the_found_latents_removes_the_plant_from_a_pipeline(dictionary):
    """The plant is put into a layer by a hook; ablation gives what is drawn without it."""
    pipeline, layer = sd(), "up_ft0"
    layers = PipelineLayers(pipeline)
    base = planted(dictionary, 1, 5, inside=False)[0]
    plant = 2.0 * dictionary.W_dec[list(PLANTED)].sum(dim=0).detach()

    def filled(vector: torch.Tensor):
        return {layer: edit(lambda out: vector[:, None, None].expand_as(out))}

    with hooked(layers, filled(base)):
        without = draw(pipeline)
    change = LatentChange(dictionary, dict.fromkeys(PLANTED, 0.0), "ablate")
    with hooked(layers, filled(base + plant)):
        with_plant = draw(pipeline)
        with edited(layers, [Edit(layer, change, D, branch="both")]):
            removed = draw(pipeline)
    assert (with_plant - without).abs().max() > 1e-3
    torch.testing.assert_close(removed, without, rtol=0, atol=1e-4)


def test_codes_of_prompts_are_means_over_positions():
    layers, layer = PipelineLayers(sd()), "text_encoder.block1"
    ksae = KSparseAutoencoder(16, 32, 4).eval()
    found = prompt_codes(layers, layer, ksae, ["a cat", "dogs"])
    codes = ksae.encode(layers.tokens(["dogs"], layer).states[0])
    expected = torch.zeros(32)
    for values, indices in zip(codes.values, codes.indices, strict=True):
        for value, index in zip(values.tolist(), indices.tolist(), strict=True):
            expected[index] += value / 16
    torch.testing.assert_close(found[1], expected)

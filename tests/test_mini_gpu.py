"""What the mini models' training on a GPU is made of, on the CPU: views, tables, batches, the loss."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st

from tools.mini.captions import captions, nouns
from tools.mini.cards import last_step
from tools.mini.clip import class_contrastive, encode_text
from tools.mini.clip_images import Nouns, build, contrastive, draw_batch, train_images
from tools.mini.configs import ClipConfig, Schedule, UnetShape, VaeConfig, Views
from tools.mini.data import PictureSet, random_view, to_pixels
from tools.mini.denoisers import TextDenoiser, build_unet, padded
from tools.mini.diffusion import noise_loss, noise_schedule
from tools.mini.latents import view_latents
from tools.mini.loop import Trainer
from tools.mini.train import device_for, read_config
from tools.mini.vae import build_vae, encode

ROOT = Path(__file__).parents[1]


def pictures(name: str, classes: tuple[str, ...], side: int, count: int = 12) -> PictureSet:
    generator = torch.Generator().manual_seed(side)
    shape = (count, 3, side, side)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return PictureSet(name, images, torch.arange(count) % len(classes), classes)


def test_the_whole_picture_is_a_view_or_its_mirror_image() -> None:
    images = pictures("cifar10", ("a",), 16, 40).images
    views = random_view(images, 16, 1.0, torch.Generator().manual_seed(0))
    pixels = to_pixels(images, 16)
    same = [torch.allclose(v, p, atol=1e-5) for v, p in zip(views, pixels, strict=True)]
    turned = [torch.allclose(v, p.flip(-1), atol=1e-5) for v, p in zip(views, pixels, strict=True)]
    assert all(a != b for a, b in zip(same, turned, strict=True))
    assert 8 < sum(turned) < 32


def test_a_view_is_a_square_of_the_asked_size_inside_the_picture() -> None:
    # Two ramps, across and down: a view's own ramps tell where it was cut and how large.
    ramp = torch.arange(64, dtype=torch.uint8) * 4
    image = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), ramp.expand(64, 64)])
    views = random_view(image.expand(200, -1, -1, -1), 64, 0.5, torch.Generator().manual_seed(1))
    across = (views[:, 0, 32, 48] - views[:, 0, 32, 16]) * 127.5 / 4 / 32
    down = (views[:, 1, 48, 32] - views[:, 1, 16, 32]) * 127.5 / 4 / 32
    assert torch.allclose(across.abs(), down, atol=1e-3)
    assert down.min() >= 0.5 - 1e-3 and down.max() <= 1 + 1e-3
    assert down.max() - down.min() > 0.4
    assert views[:, :2, 32, 32].std(0).min() > 0.05


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), min_size=1, max_size=5))
def test_padded_lists_are_their_lists(lists: list[list[int]]) -> None:
    table, lengths = padded(lists)
    assert [row[:n].tolist() for row, n in zip(table, lengths.tolist(), strict=True)] == lists


def test_rows_are_drawn_as_one_by_one() -> None:
    by_class = [[0, 1, 2], [3], [4, 5]]
    unet = build_unet(UnetShape(channels=(8, 8, 8, 8), heads=(1, 1, 1, 1)), 4)
    denoiser = TextDenoiser(unet, torch.zeros(7, 2, 4), by_class, [0, 3, 4])
    labels = torch.arange(600) % 3
    found = denoiser.draw_rows(labels, 0.3, torch.Generator().manual_seed(4)).tolist()
    drop, pick = torch.rand(2, 600, generator=torch.Generator().manual_seed(4)).tolist()
    assert found == [
        6 if d < 0.3 else by_class[k][int(p * len(by_class[k]))]
        for k, d, p in zip(labels.tolist(), drop, pick, strict=True)
    ]


def test_the_first_view_is_the_picture_itself() -> None:
    vae = build_vae(replace(vae_config(), side=16)).eval()
    assert isinstance(vae, AutoencoderKL)
    images = pictures("cifar10", ("a",), 20).images
    latents = view_latents(vae, images, 16, Views(count=3, smallest=0.8))
    assert latents.shape == (36, 4, 8, 8)
    assert torch.equal(latents[:12], encode(vae, images, 16).half())
    assert not torch.equal(latents[12:24], latents[24:])
    again = view_latents(vae, images, 16, Views(count=3, smallest=0.8))
    assert torch.equal(latents, again)


def vae_config() -> VaeConfig:
    config = read_config(ROOT / "tools" / "configs" / "mini-vae.yaml")
    assert isinstance(config, VaeConfig)
    return replace(config, channels=(8, 8))


def test_the_loss_is_mini_clips_on_the_columns_that_have_pictures() -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    owner = torch.tensor([0, 3, 3, 0, 4, 4])
    kept = torch.tensor([0, 3, 4])
    place = torch.tensor([0, 1, 1, 0, 2, 2])
    # By picture all columns count, by caption only those with pictures.
    by_caption = 2 * class_contrastive(logits[:, kept], place) - F.cross_entropy(
        logits[:, kept], place
    )
    wanted = 0.5 * (F.cross_entropy(logits, owner) + by_caption)
    assert torch.allclose(contrastive(logits, owner), wanted)


def clip_config() -> ClipConfig:
    config = read_config(ROOT / "tools" / "configs" / "gpu" / "mini-clip.yaml", minutes=1e-4)
    assert isinstance(config, ClipConfig)
    schedule = replace(config.schedule, batch=16, precision="float32")
    return replace(
        config, text_from=str(ROOT / "models" / "mini-clip"), schedule=schedule, vision_layers=1
    )


def clip_sets() -> list[PictureSet]:
    return [pictures("caltech101", ("ant", "airplanes"), 20), pictures("cifar10", ("airplane",), 8)]


def test_captions_are_drawn_of_the_noun_in_any_of_its_sets() -> None:
    model, tokenizer = build(clip_config())
    sets = clip_sets()
    known = Nouns(model, tokenizer, sets)
    assert [c.tolist() for c in known.columns] == [[0, 1], [1]]
    wanted = {
        0: captions("caltech101", "ant"),
        1: [*captions("caltech101", "airplane"), *captions("cifar10", "airplane")],
    }
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([known.draw(generator) for _ in range(200)])
    for column, lines in wanted.items():
        lines = list(dict.fromkeys(lines))
        with torch.no_grad():
            table = encode_text(model, tokenizer, lines)
        distance = torch.cdist(drawn[:, column].detach(), table)
        assert distance.min(1).values.max() < 1e-3
        assert len(set(distance.argmin(1).tolist())) == len(lines)


def test_a_batch_holds_pictures_with_their_own_nouns() -> None:
    sets = clip_sets()
    columns = [torch.tensor([0, 1]), torch.tensor([1])]
    config = replace(clip_config(), views=Views(smallest=1.0), side=8)
    pixels, owner = draw_batch(sets, columns, config, torch.Generator().manual_seed(0))
    assert pixels.shape == (15, 3, 8, 8)
    assert set(owner[:10].tolist()) == {0, 1} and set(owner[10:].tolist()) == {1}
    assert len(nouns(sets[0])) == 2


def test_the_text_encoder_stays_and_the_image_encoder_moves(tmp_path: Path) -> None:
    from transformers import CLIPModel

    config = clip_config()
    before, _ = build(config)
    train_images(config, clip_sets(), clip_sets()[:1], tmp_path / "run", resume=False)
    after = CLIPModel.from_pretrained(tmp_path / "run" / "final", dtype=torch.float32)
    for name, value in before.state_dict().items():
        if name.startswith("text_"):
            assert torch.equal(value, after.state_dict()[name]), name
    shipped = CLIPModel.from_pretrained(ROOT / "models" / "mini-clip", dtype=torch.float32)
    assert torch.equal(shipped.text_projection.weight, after.text_projection.weight)
    weight = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(before.state_dict()[weight], after.state_dict()[weight])


def test_products_in_bfloat16_leave_the_weights_in_float32() -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64)
        trainer = Trainer(model, Schedule(minutes=1e6, precision=precision))
        seen = []

        def loss(generator: torch.Generator) -> torch.Tensor:
            found = trainer.model(torch.randn(8, 64, generator=generator))  # noqa: B023
            seen.append(found.dtype)  # noqa: B023
            return found.float().pow(2).mean()

        losses[precision] = float(trainer.update(loss).loss)
        assert seen == [getattr(torch, precision)]
        assert {p.dtype for p in (*trainer.parameters, *trainer.average)} == {torch.float32}
    assert losses["float32"] == pytest.approx(losses["bfloat16"], rel=0.02)


def small_denoiser(device: str = "cpu") -> TextDenoiser:
    torch.manual_seed(0)
    unet = build_unet(UnetShape(channels=(8, 8, 16, 16), heads=(1, 1, 2, 2)), 12).eval()
    unet.to(device, memory_format=torch.channels_last)  # pyright: ignore
    return TextDenoiser(unet, torch.randn(3, 5, 12).to(device), [[0], [1]], [0, 1])


def test_a_recorded_step_is_for_training_only() -> None:
    denoiser = small_denoiser()
    noisy, times = torch.zeros(2, 4, 16, 16), torch.tensor([1, 2])
    with torch.no_grad():
        wanted = denoiser.predict(noisy, times, times)

    class Recorded(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor):
            assert torch.equal(states, denoiser.table[times])
            return torch.full_like(noisy, 7.0)

    denoiser.recorded = Recorded()
    assert (denoiser.predict(noisy, times, times) == 7.0).all()
    with torch.no_grad():
        assert torch.equal(denoiser.predict(noisy, times, times), wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_gives_the_gradients_of_an_unrecorded_one() -> None:
    plain, recorded = small_denoiser("cuda"), small_denoiser("cuda")
    clean = torch.randn(6, 4, 16, 16, device="cuda")
    recorded.record(clean, "float32")
    assert recorded.recorded is not None
    rows = torch.arange(6, device="cuda") % 3
    schedule = noise_schedule()
    for seed in (0, 1):
        for denoiser in (plain, recorded):
            generator = torch.Generator("cuda").manual_seed(seed)
            noise_loss(denoiser, clean, rows, schedule, 5.0, generator).backward()
            torch.optim.SGD(denoiser.model.parameters(), lr=0.1).step()
        for a, b in zip(plain.model.parameters(), recorded.model.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            assert torch.allclose(a.grad, b.grad, rtol=1e-2, atol=1e-4)
        plain.model.zero_grad()
        recorded.model.zero_grad()


def test_a_device_that_is_not_there_is_refused() -> None:
    diffusion = read_config(ROOT / "tools" / "configs" / "gpu" / "mini-sd-photo.yaml")
    if not torch.cuda.is_available():
        assert device_for(diffusion, "auto").type == "cpu"
        with pytest.raises(ValueError, match="sees no GPU"):
            device_for(diffusion, "cuda")
    assert device_for(vae_config(), "auto").type == "cpu"


def test_the_card_names_what_a_model_was_trained_on(tmp_path: Path) -> None:
    lines = [{"device": "NVIDIA H100"}, {"step": 1, "rate": 2.0}, {"step": 2}]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert last_step(tmp_path) == (lines[1], "one NVIDIA H100")
    log.write_text(json.dumps(lines[1]) + "\n")
    assert last_step(tmp_path) == (lines[1], "two shared processor cores")
    assert last_step(tmp_path / "none") == ({}, "two shared processor cores")

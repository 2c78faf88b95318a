"""mini-clip: a small `CLIPModel`, trained on pictures and captions made from their class names.

A batch holds each class several times, so the plain contrastive loss would push pictures away from
captions that fit. Here each distinct noun of a batch gets one caption; with logits l[i, u] of
picture i and caption u,

    loss = mean_i CE(l[i, :], noun of i) / 2 + mean_u (logsumexp_i l[i, u] - mean_{i shows u} l[i, u]) / 2.

The text encoder conditions mini-sd. It is final after `text_minutes`: from then on it is frozen at
its moving average and only the image encoder goes on learning against it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from revelio.mini.captions import PROMPT, corpus, draw_caption, nouns
from revelio.mini.configs import ClipConfig
from revelio.mini.data import PictureSet, random_flip, to_pixels
from revelio.mini.loop import Trainer
from revelio.mini.runs import run
from revelio.mini.tokenizer import build_tokenizer

CLIP_MEAN = (0.5, 0.5, 0.5)
CLIP_STD = (0.5, 0.5, 0.5)
HELD_OUT = 500


def build_clip(config: ClipConfig, tokenizer: CLIPTokenizer) -> CLIPModel:
    """The untrained model for a tokenizer."""
    shared = {"hidden_act": "gelu", "projection_dim": config.projection}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.text_width,
        intermediate_size=4 * config.text_width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.max_length,
        bos_token_id=tokenizer.bos_token_id,  # pyright: ignore
        eos_token_id=tokenizer.eos_token_id,  # pyright: ignore
        pad_token_id=tokenizer.pad_token_id,  # pyright: ignore
        **shared,
    )
    vision = CLIPVisionConfig(
        image_size=config.side,
        patch_size=config.patch,
        hidden_size=config.vision_width,
        intermediate_size=4 * config.vision_width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.heads,
        **shared,
    )
    return CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=config.projection,
        )
    )


def encode_text(model: CLIPModel, tokenizer: CLIPTokenizer, lines: list[str]) -> torch.Tensor:
    """Unit text embeddings `(n, p)`; attention is causal, so more padding changes nothing."""
    tokens = tokenizer(lines, padding=True, truncation=True, return_tensors="pt").to(model.device)
    pooled = model.text_model(input_ids=tokens.input_ids).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


def encode_pixels(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    """Unit image embeddings `(n, p)` of pixels in [-1, 1]."""
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    return F.normalize(model.visual_projection(pooled), dim=-1)


def class_contrastive(logits: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """The loss above for logits `(b, u)` and each picture's column `owner (b,)`."""
    by_picture = F.cross_entropy(logits, owner)
    shows = F.one_hot(owner, logits.shape[1]).to(logits.dtype)
    positives = (logits * shows).sum(0) / shows.sum(0)
    by_caption = (logits.logsumexp(0) - positives).mean()
    return 0.5 * (by_picture + by_caption)


@torch.no_grad()
def closest_caption(
    model: CLIPModel, tokenizer: CLIPTokenizer, pictures: PictureSet
) -> torch.Tensor:
    """Predicted class `(n,)` by the nearest of `a photo of a <noun>`.

    CLIP's zero-shot rule, but these nouns were trained on: for mini-clip it is a closed set.
    """
    text = encode_text(model, tokenizer, [PROMPT.format(word) for word in nouns(pictures)])
    side = int(model.config.vision_config.image_size)  # pyright: ignore
    rows = [
        encode_pixels(model, to_pixels(part.to(model.device), side)) @ text.T
        for part in pictures.images.split(250)
    ]
    return torch.cat(rows).argmax(1).to(pictures.labels.device)


def _batch(sets: list[PictureSet], config: ClipConfig, generator: torch.Generator):
    """Pixels, their captions' columns, and one caption a distinct noun."""
    share = config.schedule.share // (len(sets) + 1)
    columns: dict[str, int] = {}
    lines: list[str] = []
    pixels, owner = [], []
    for position, pictures in enumerate(sets):
        # The first set, the demo's, is drawn twice as often as each other.
        rows = torch.randint(
            len(pictures), (share * (2 if position == 0 else 1),), generator=generator
        )
        pixels.append(to_pixels(pictures.images[rows], config.side))
        words = nouns(pictures)
        for label in pictures.labels[rows].tolist():
            word = words[label]
            if word not in columns:
                columns[word] = len(lines)
                lines.append(draw_caption(pictures.name, word, generator))
            owner.append(columns[word])
    return random_flip(torch.cat(pixels), generator), torch.tensor(owner), lines


def _freeze_text(
    trainer: Trainer, model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path
) -> None:
    """Fix the text encoder at its moving average and save it for mini-sd."""
    mine = {id(p) for p in (*model.text_model.parameters(), *model.text_projection.parameters())}
    with torch.no_grad():
        for parameter, mean in zip(trainer.parameters, trainer.average, strict=True):
            if id(parameter) in mine:
                parameter.copy_(mean)
    if trainer.rank == 0 and not (folder / "text_encoder").is_dir():
        temporary = folder / "text_encoder.tmp"
        text = CLIPTextModel(model.config.text_config)  # pyright: ignore
        text.load_state_dict(
            {
                k.removeprefix("text_model."): v
                for k, v in model.state_dict().items()
                if k.startswith("text_model.")
            }
        )
        text.save_pretrained(temporary)
        tokenizer.save_pretrained(folder / "tokenizer")
        temporary.rename(folder / "text_encoder")


def train_clip(
    config: ClipConfig,
    sets: list[PictureSet],
    held_out: list[PictureSet],
    folder: Path,
    *,
    resume: bool,
) -> None:
    """Train and save `text_encoder/` and `tokenizer/` as soon as they are final, `final/` at the end."""
    torch.manual_seed(config.schedule.seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(corpus(sets), config.vocabulary, config.max_length)
    model = build_clip(config, tokenizer)
    trainer = Trainer(model, config.schedule)
    frozen: list[bool] = []

    def loss_function(generator: torch.Generator) -> torch.Tensor:
        pixels, owner, lines = _batch(sets, config, generator)
        if not frozen and trainer.seconds >= 60 * config.text_minutes:
            _freeze_text(trainer, model, tokenizer, folder)
            frozen.append(True)
        with torch.set_grad_enabled(not frozen):
            text = encode_text(model, tokenizer, lines)
        scale = model.logit_scale.clamp(max=4.6052).exp()
        return class_contrastive(scale * encode_pixels(model, pixels) @ text.T, owner)

    run(
        trainer,
        loss_function,
        folder,
        resume=resume,
        check=lambda: check(model, tokenizer, held_out),
    )
    if trainer.rank == 0:
        save(model, tokenizer, config.side, folder / "final")


def check(
    model: CLIPModel, tokenizer: CLIPTokenizer, held_out: list[PictureSet]
) -> dict[str, float]:
    """Accuracy by the closest caption on some held-out pictures of every set."""
    found = {}
    for pictures in held_out:
        some = pictures.subset(torch.arange(0, len(pictures), max(1, len(pictures) // HELD_OUT)))
        right = (closest_caption(model, tokenizer, some) == some.labels).float().mean()
        found[f"closed_set_{pictures.name}"] = round(float(right), 4)
    return found


def save(model: CLIPModel, tokenizer: CLIPTokenizer, side: int, folder: Path) -> None:
    """Write a trained model's folder with its tokenizer and image processor."""
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor(side).save_pretrained(folder)


def processor(side: int) -> CLIPImageProcessor:
    """The image processor that does what `to_pixels` does for pictures from outside."""
    return CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )

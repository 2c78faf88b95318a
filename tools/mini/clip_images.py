"""mini-clip's image encoder alone, against the text encoder of a finished mini-clip.

The text side stands still, so the embeddings of all captions are a table, every noun is a column of
every batch, and pictures, views and batches can stay on a GPU. The loss is that of `clip`, over the
columns that a batch has pictures of.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer

from tools.mini.captions import captions, nouns
from tools.mini.clip import build_clip, check, encode_pixels, encode_text, save
from tools.mini.configs import ClipConfig
from tools.mini.data import PictureSet, random_view
from tools.mini.denoisers import padded
from tools.mini.loop import Trainer
from tools.mini.runs import run


def contrastive(logits: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """`clip.class_contrastive` for columns of which some have no picture in the batch.

    Args:
        logits: `(b, u)`.
        owner: Each picture's column, `(b,)`.
    """
    by_picture = F.cross_entropy(logits, owner)
    shows = F.one_hot(owner, logits.shape[1]).to(logits.dtype)
    counts = shows.sum(0)
    positives = (logits * shows).sum(0) / counts.clamp(min=1.0)
    by_caption = torch.where(counts > 0, logits.logsumexp(0) - positives, 0.0).sum()
    return 0.5 * (by_picture + by_caption / (counts > 0).sum())


class Nouns:
    """Every distinct noun of the sets: its captions' embeddings, and each set's classes as columns.

    Attributes:
        columns: Of every set, the column of each of its classes `(classes,)`.
        embeddings: Of all captions `(captions, p)`, unit length.
        rows, counts: Of each noun, its captions' rows (padded) and how many they are.
    """

    @torch.no_grad()
    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, sets: list[PictureSet]) -> None:
        lines: dict[str, dict[str, None]] = {}
        for pictures in sets:
            for word in nouns(pictures):
                lines.setdefault(word, {}).update(dict.fromkeys(captions(pictures.name, word)))
        place = {word: i for i, word in enumerate(lines)}
        flat = [line for some in lines.values() for line in some]
        starts = torch.tensor([0, *(len(some) for some in lines.values())]).cumsum(0).tolist()
        by_noun = [list(range(a, b)) for a, b in pairwise(starts)]
        self.columns = [
            torch.tensor([place[word] for word in nouns(pictures)], device=model.device)
            for pictures in sets
        ]
        self.embeddings = encode_text(model, tokenizer, flat)
        self.rows, self.counts = padded(by_noun, model.device)

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """One caption of every noun, all equally likely: `(nouns, p)`."""
        drawn = torch.rand(len(self.counts), generator=generator, device=generator.device)
        pick = (drawn.double() * self.counts).long()
        return self.embeddings[self.rows.gather(1, pick[:, None])[:, 0]]


def draw_batch(
    sets: list[PictureSet],
    columns: list[torch.Tensor],
    config: ClipConfig,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views `(b, 3, side, side)` and columns `(b,)`; the first set is drawn twice as often as each other."""
    share = config.schedule.share // (len(sets) + 1)
    pixels, owner = [], []
    for position, (pictures, column) in enumerate(zip(sets, columns, strict=True)):
        size = (share * (2 if position == 0 else 1),)
        chosen = torch.randint(len(pictures), size, generator=generator, device=generator.device)
        images = pictures.images[chosen]
        pixels.append(random_view(images, config.side, config.views.smallest, generator))
        owner.append(column[pictures.labels[chosen]])
    return torch.cat(pixels), torch.cat(owner)


def build(config: ClipConfig) -> tuple[CLIPModel, CLIPTokenizer]:
    """An untrained image encoder beside the frozen text encoder of `text_from`, and its tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(config.text_from)
    finished = CLIPModel.from_pretrained(config.text_from, dtype=torch.float32)
    model = build_clip(config, tokenizer)
    for mine, its in (
        (model.text_model, finished.text_model),
        (model.text_projection, finished.text_projection),
    ):
        mine.load_state_dict(its.state_dict())
        mine.requires_grad_(False)
    return model, tokenizer


def train_images(
    config: ClipConfig,
    sets: list[PictureSet],
    held_out: list[PictureSet],
    folder: Path,
    *,
    resume: bool,
    device: torch.device | str = "cpu",
) -> None:
    """Train the image encoder and save the whole model to `folder/final`."""
    torch.manual_seed(config.schedule.seed)
    model, tokenizer = build(config)
    model.to(device)  # pyright: ignore
    sets = [pictures.to(torch.device(device)) for pictures in sets]
    known = Nouns(model, tokenizer, sets)
    trainer = Trainer(model, config.schedule)

    def loss_function(generator: torch.Generator) -> torch.Tensor:
        pixels, owner = draw_batch(sets, known.columns, config, generator)
        images = encode_pixels(model, pixels).float()
        scale = model.logit_scale.clamp(max=4.6052).exp()
        # Logits reach a hundred: half precision would move them by tenths.
        with torch.autocast(trainer.device.type, enabled=False):
            return contrastive(scale * images @ known.draw(generator).T, owner)

    run(
        trainer,
        loss_function,
        folder,
        resume=resume,
        check=lambda: check(model, tokenizer, held_out),
    )
    if trainer.rank == 0:
        save(model, tokenizer, config.side, folder / "final")

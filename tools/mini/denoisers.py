"""The two kinds of denoiser behind one call: noise of latents at a timestep, given rows of a condition table.

A text-conditional U-Net looks its rows up in a table of text states (one caption a row, the empty
prompt last); a class-conditional DiT takes them as class labels with the null class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from tools.mini.captions import PROMPT, captions, nouns
from tools.mini.configs import DitShape, UnetShape
from tools.mini.data import PictureSet
from tools.mini.graphed import record

# DiTPipeline writes its null class as 1000, so a DiT of any number of classes keeps ImageNet's table.
DIT_CLASSES = 1000


class Denoiser(Protocol):
    """What training and the Diffusion Classifier need of a model."""

    @property
    def model(self) -> nn.Module:
        """The network."""
        ...

    def predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """Noise `(b, 4, h, w)` of noisy latents under the condition rows `(b,)`."""
        ...

    def draw_rows(
        self, labels: torch.Tensor, empty_share: float, generator: torch.Generator
    ) -> torch.Tensor:
        """A condition row for each label, the empty one with probability `empty_share`."""
        ...

    def prompt_rows(self) -> torch.Tensor:
        """The row of every class in order, by its plain prompt."""
        ...


def build_unet(shape: UnetShape, text_width: int) -> UNet2DConditionModel:
    """A U-Net with SD-1.5's block types on 16x16x4 latents."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=shape.channels,
        layers_per_block=shape.blocks,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=text_width,
        attention_head_dim=shape.heads,  # pyright: ignore  # diffusers' name for the number of heads
        norm_num_groups=shape.groups,
    )


def build_dit(shape: DitShape) -> DiTTransformer2DModel:
    """A DiT on 16x16x4 latents; epsilon only, no learned variance."""
    return DiTTransformer2DModel(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_width,
        in_channels=4,
        out_channels=4,
        num_layers=shape.blocks,
        sample_size=16,
        patch_size=shape.patch,
        num_embeds_ada_norm=DIT_CLASSES,
    )


def padded(
    lists: list[list[int]], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of numbers as one table `(n, longest)`, zeros behind the shorter ones, and their lengths."""
    rows = [torch.tensor(numbers) for numbers in lists]
    lengths = torch.tensor([len(numbers) for numbers in lists])
    table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return table.to(device), lengths.to(device)


@dataclass
class TextDenoiser:
    """A U-Net with the text states of every caption it is trained on."""

    model: UNet2DConditionModel
    table: torch.Tensor
    by_class: list[list[int]]
    prompts: list[int]
    recorded: nn.Module | None = None

    def predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """See `Denoiser`."""
        states = self.table[rows]
        # Trainings have batches of one size; what is measured without gradients has others.
        if self.recorded is not None and torch.is_grad_enabled():
            return self.recorded(noisy, timesteps, states)
        return self.model(noisy, timesteps, encoder_hidden_states=states).sample

    def draw_rows(
        self, labels: torch.Tensor, empty_share: float, generator: torch.Generator
    ) -> torch.Tensor:
        """See `Denoiser`; all captions of a class are equally likely."""
        device = generator.device
        # In double precision, or a draw next to one would round up to a caption too many.
        drop, pick = torch.rand(2, len(labels), generator=generator, device=device).double()
        choices, counts = self._choices
        labels = labels.to(choices.device)
        place = (pick.to(labels.device) * counts[labels]).long()
        empty = torch.full_like(place, len(self.table) - 1)
        return torch.where(drop.to(labels.device) < empty_share, empty, choices[labels, place])

    @cached_property
    def _choices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Every class's rows `(classes, most)`, the shorter ones padded, and how many `(classes,)`."""
        return padded(self.by_class, self.table.device)

    def record(self, clean: torch.Tensor, precision: str) -> None:
        """Record the U-Net for training on batches of latents `(b, 4, h, w)` like these."""
        noisy = clean.float().contiguous(memory_format=torch.channels_last)
        states = self.table[torch.zeros(len(clean), dtype=torch.long, device=clean.device)]
        self.recorded = record(self.model, noisy, states, getattr(torch, precision))

    def prompt_rows(self) -> torch.Tensor:
        """See `Denoiser`: `a photo of a <noun>`."""
        return torch.tensor(self.prompts)


@dataclass
class ClassDenoiser:
    """A DiT with class labels."""

    model: DiTTransformer2DModel
    classes: int

    def predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """See `Denoiser`."""
        return self.model(noisy, timestep=timesteps, class_labels=rows).sample

    def draw_rows(
        self, labels: torch.Tensor, empty_share: float, generator: torch.Generator
    ) -> torch.Tensor:
        """See `Denoiser`."""
        device = generator.device
        drawn = torch.rand(len(labels), generator=generator, device=device).to(labels.device)
        dropped = drawn < empty_share
        return torch.where(dropped, torch.full_like(labels, DIT_CLASSES), labels)

    def prompt_rows(self) -> torch.Tensor:
        """See `Denoiser`: the labels themselves."""
        return torch.arange(self.classes)


@torch.no_grad()
def text_states(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, lines: list[str]) -> torch.Tensor:
    """Last hidden states `(n, t, d)` of captions, padded as `StableDiffusionPipeline` pads them."""
    rows = []
    for start in range(0, len(lines), 128):
        part = lines[start : start + 128]
        tokens = tokenizer(part, padding="max_length", truncation=True, return_tensors="pt")
        rows.append(encoder(input_ids=tokens.input_ids).last_hidden_state)
    return torch.cat(rows)


def caption_table(sets: list[PictureSet]) -> tuple[list[str], list[list[int]], list[int]]:
    """All captions with the empty prompt last, each class's rows, and each class's plain prompt.

    Classes are numbered through: those of the second set follow those of the first.
    """
    rows: dict[str, int] = {}
    by_class, prompts = [], []
    for pictures in sets:
        for word in nouns(pictures):
            lines = captions(pictures.name, word)
            by_class.append([rows.setdefault(line, len(rows)) for line in lines])
            prompts.append(rows[PROMPT.format(word)])
    return [*rows, ""], by_class, prompts


def text_denoiser(
    shape: UnetShape, clip_folder: Path, sets: list[PictureSet], device: torch.device | str = "cpu"
) -> TextDenoiser:
    """An untrained U-Net with the text states of the sets' captions by a trained mini-clip."""
    encoder = CLIPTextModel.from_pretrained(
        clip_folder / "text_encoder", dtype=torch.float32
    ).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder / "tokenizer")
    lines, by_class, prompts = caption_table(sets)
    table = text_states(encoder, tokenizer, lines).to(device)
    unet = build_unet(shape, table.shape[-1]).to(device, memory_format=torch.channels_last)  # pyright: ignore
    return TextDenoiser(unet, table, by_class, prompts)

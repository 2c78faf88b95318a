"""The methods of the proof: two routes of steering by latents, directions, and what they are beside."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from revelio.backbones.hooks import hooked
from revelio.pipelines.steer_eval import random_like
from revelio.sae.config import TrainConfig
from revelio.sae.dataloader import batches_of
from revelio.sae.kernels.select import fastest_kernel
from revelio.sae.metrics import evaluate
from revelio.sae.model import KSparseAutoencoder, best_scale
from revelio.sae.train import SAERun, begin, train_many
from revelio.seeds import generator
from revelio.steering.concept import Concept, all_codes, from_texts
from revelio.steering.edits import Edit, LatentChange
from revelio.steering.find import Found, find_latents, prompt_codes
from revelio.steering.steer import edited, steered
from tools.steering.setting import CAPTIONS, WORDS, Method, Setting

TEXT_LAYER = "text_encoder.block1"
DENOISER_LAYERS = ("bottleneck", "up_ft0", "up_ft1")
EXPANSION, K = 4, 4
TRAIN_STEPS, LEARNING_RATE = 300, 1e-4
SPECIFICITY, MOST = 0.9, 64
# Captions a class whose generation the denoiser's k-SAEs are trained on.
TRAIN_PICTURES = 6


class Methods:
    """All methods, on one setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def all(self) -> list[Method]:
        """The unsteered model first."""
        few = (0.5, 0.75, 1.0)
        found = [
            Method("plain", "baseline", lambda _target, _strength: nullcontext()),
            Method("text latents", "text", self.text_latents, (1.0, 1.5, 2.0)),
            Method("difference of means", "baseline", self.means, few),
            Method("negative prompt", "baseline", lambda _t, _s: nullcontext(), negative=True),
            Method("text contrast", "text", self.contrast, few),
            Method("text as published", "text", self.published, (0.25, 0.5, 1.0)),
            Method("random direction", "baseline", self.random, few),
        ]
        for layers in (DENOISER_LAYERS, *((one,) for one in DENOISER_LAYERS)):
            found.append(
                Method(
                    f"latents of {'+'.join(layers)}",
                    "denoiser",
                    lambda target, strength, layers=layers: self.denoiser(layers, target, strength),
                    (1.0, 2.0, 4.0),
                )
            )
        found.append(Method("turn into, latents", "into", self.into, (1.0,)))
        found.append(Method("turn into, means", "into", self.into_means, (1.0,)))
        return found

    def text_latents(self, target: str, strength: float) -> AbstractContextManager[None]:
        """Ablate the latents that fire for the target's captions, wherever they fire."""
        change = LatentChange(
            self.text_ksae, dict.fromkeys(self.text_found(target).latents, 0.0), "ablate"
        )
        one = Edit(TEXT_LAYER, change, self.text_ksae.d, strength)
        return edited(self.setting.layers, [one])

    def means(self, target: str, strength: float) -> AbstractContextManager[None]:
        """Subtract the difference of means, without a k-SAE."""
        return steered(self.setting.layers, self._contrast(target, ksae=False), -strength)

    def contrast(self, target: str, strength: float) -> AbstractContextManager[None]:
        """Subtract the contrast of mean codes, decoded."""
        return steered(self.setting.layers, self._contrast(target, ksae=True), -strength)

    def into(self, target: str, strength: float) -> AbstractContextManager[None]:
        """Add the contrast of mean codes, decoded."""
        return steered(self.setting.layers, self._contrast(target, ksae=True), strength)

    def into_means(self, target: str, strength: float) -> AbstractContextManager[None]:
        """Add the difference of means."""
        return steered(self.setting.layers, self._contrast(target, ksae=False), strength)

    def published(self, target: str, strength: float) -> AbstractContextManager[None]:
        """Subtract the dense codes of the word, decoded (SPEC 7)."""
        concept = from_texts(self.setting.layers, TEXT_LAYER, self.text_ksae, [target])
        return steered(self.setting.layers, concept, -strength)

    def random(self, target: str, strength: float) -> AbstractContextManager[None]:
        """Subtract a random direction of the norm that the difference of means has."""
        one = self._contrast(target, ksae=False).edit(-strength)
        return edited(self.setting.layers, [random_like(one, WORDS.index(target))])

    def denoiser(
        self, layers: tuple[str, ...], target: str, strength: float
    ) -> AbstractContextManager[None]:
        """Ablate the target's latents in layers of the U-Net, in the conditional half."""
        edits = []
        for layer in layers:
            ksae = self.denoiser_ksae(layer)
            values = dict.fromkeys(self.denoiser_found(layer, target).latents, 0.0)
            change = LatentChange(ksae, values, "ablate")
            edits.append(Edit(layer, change, ksae.d, strength, branch="conditional"))
        return edited(self.setting.layers, edits)

    @cached_property
    def text_ksae(self) -> KSparseAutoencoder:
        """The k-SAE of the text encoder's tokens, of all captions, padding included."""
        texts = [text for word in WORDS for text in CAPTIONS[word]]
        rows = self.setting.layers.tokens(texts, TEXT_LAYER).states.flatten(0, 1)
        return self._trained(rows, TEXT_LAYER)

    @cache  # noqa: B019
    def text_found(self, target: str) -> Found:
        """The target's latents, found on half of its captions."""
        codes = {
            word: prompt_codes(self.setting.layers, TEXT_LAYER, self.text_ksae, CAPTIONS[word])
            for word in WORDS
        }
        return _found(codes, target)

    @cache  # noqa: B019
    def denoiser_found(self, layer: str, target: str) -> Found:
        """The target's latents, found on half of the pictures that name it."""
        ksae, rows = self.denoiser_ksae(layer), self._generation(layer)
        codes = {
            word: all_codes(ksae, part.flatten(0, -2), "sparse").view(*part.shape[:2], -1).mean(1)
            for word, part in zip(WORDS, rows, strict=True)
        }
        return _found(codes, target)

    @cache  # noqa: B019
    def denoiser_ksae(self, layer: str) -> KSparseAutoencoder:
        """The k-SAE of a U-Net's layer, of its cells during generation."""
        rows = self._generation(layer).flatten(0, -2)
        most = torch.randperm(len(rows), generator=generator(0, "rows", layer))[:8192]
        return self._trained(rows[most], layer)

    @cache  # noqa: B019
    def _contrast(self, target: str, *, ksae: bool) -> Concept:
        against = [text for word in WORDS if word != target for text in CAPTIONS[word]]
        model = self.text_ksae if ksae else None
        layers = self.setting.layers
        return from_texts(layers, TEXT_LAYER, model, CAPTIONS[target], against, codes="sparse")

    def _generation(self, layer: str) -> Tensor:
        """The conditional half's cells while every class is drawn: (classes pictures steps*cells d)."""
        path = self.setting.work / "cells.pt"
        if not path.exists():
            self._record(path)
        return torch.load(path, weights_only=True)[layer]

    def _record(self, path: Path) -> None:
        found: dict[str, list[Tensor]] = {layer: [] for layer in DENOISER_LAYERS}

        def note(layer: str):
            def keep(output: Tensor) -> None:
                half = output[len(output) // 2 :]
                found[layer].append(half.flatten(2).transpose(1, 2).half())

            return keep

        functions = {layer: note(layer) for layer in DENOISER_LAYERS}
        # One seed a caption, others than those that judge.
        prompts = [(text, word, 100) for word in WORDS for text in CAPTIONS[word][:TRAIN_PICTURES]]
        with hooked(self.setting.layers, functions, exact=False):
            self.setting.draw(prompts, "train")
        cells = {
            layer: torch.stack(parts, dim=1).float().flatten(1, 2).unflatten(0, (len(WORDS), -1))
            for layer, parts in found.items()
        }
        torch.save(cells, path)

    def _trained(self, rows: Tensor, layer: str) -> KSparseAutoencoder:
        """A k-SAE of rows, begun from the data and then trained; kept on disk."""
        path = self.setting.work / f"ksae-{layer}"
        if not path.exists():
            ksae = begun_from_data(rows)
            found = evaluate(ksae, rows.split(1024))
            ksae.trained_on.update(layer=layer, fvu=found.fvu, dead=found.dead_share)
            ksae.save_pretrained(path)
        return KSparseAutoencoder.from_pretrained(path)


def begun_from_data(rows: Tensor) -> KSparseAutoencoder:
    """A k-SAE whose directions begin as rows of the data, then trained.

    With random directions nine tenths of the latents of so small a text encoder never fire: its tokens lie in
    few dimensions, and what is not near the data at first never enters the top k.
    """
    ksae = KSparseAutoencoder(rows.shape[1], EXPANSION * rows.shape[1], K)
    config = TrainConfig(
        steps=TRAIN_STEPS, batch_size=480, warmup_steps=20, learning_rate=LEARNING_RATE
    )
    batches = batches_of(rows, config)
    state = begin(ksae, batches, config)
    pick = torch.randperm(len(rows), generator=generator(0, "directions"))[: ksae.n]
    with torch.no_grad():
        directions = rows[pick] - ksae.b_dec
        ksae.W_dec[: len(pick)] = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-6)
        ksae.W_enc.copy_(ksae.W_dec)
        ksae.W_enc.mul_(best_scale(ksae, rows))
    for _ in train_many([SAERun(ksae, config, state, fastest_kernel(ksae))], batches):
        pass
    return ksae.eval()


def _found(codes: dict[str, Tensor], target: str) -> Found:
    """The latents of a target; where none is specific enough, those of the most specific."""
    outside = torch.cat([codes[word] for word in WORDS if word != target])
    for least in (SPECIFICITY, 0.8, 0.7, 0.6, 0.5):
        try:
            return find_latents(codes[target], outside, count=MOST, specificity=least)
        except ValueError:
            continue
    raise ValueError(f"no latents for {target}")

"""The methods of the proof: two routes of steering by latents, directions, and what they are beside."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from revelio.backbones.hooks import hooked
from revelio.files import write_whole_by
from revelio.pipelines.steer_eval import random_like
from revelio.sae.config import TrainConfig
from revelio.sae.dataloader import batches_of
from revelio.sae.kernels.select import fastest_kernel
from revelio.sae.metrics import evaluate
from revelio.sae.model import KSparseAutoencoder, best_scale
from revelio.sae.train import SAERun, begin, train_many
from revelio.seeds import generator
from revelio.steering.concept import Concept, all_codes, from_texts
from revelio.steering.edits import Direction, Edit, LatentChange
from revelio.steering.find import Found, find_latents, prompt_codes
from revelio.steering.steer import edited, steered
from tools.steering.setting import CAPTIONS, PLAIN, WORDS, Method, Setting

TEXT_LAYER = "text_encoder.block1"
EXPANSION, K = 4, 4
TRAIN_STEPS, LEARNING_RATE = 300, 1e-4
SPECIFICITY, MOST = 0.9, 64
# The captions that name a class when it is judged are the first four.
UNSEEN = {word: captions[4:] for word, captions in CAPTIONS.items()}
# Of the text route's studies: one setting changed, at the strength that the route is judged at.
STUDY_STRENGTH = 3.0
STUDY_LAYERS = ("text_encoder.block0", "text_encoder.block2")
STUDY_SIZES = ((1, 4), (16, 4), (4, 2), (4, 8), (4, 16))


@dataclass(frozen=True)
class Recipe:
    """How the k-SAEs of the denoiser's layers are trained: the small ones of the first table by default."""

    expansion: int = EXPANSION
    k: int = K
    steps: int = TRAIN_STEPS
    batch: int = 480
    learning_rate: float = LEARNING_RATE
    rows: int = 8192


class Methods:
    """All methods, on one setting."""

    def __init__(self, setting: Setting, recipe: Recipe | None = None) -> None:
        self.setting, self.recipe = setting, recipe or Recipe()

    def all(self) -> list[Method]:
        """The unsteered model first."""
        text = self._of_text() if self.setting.layers.encoders else []
        return [PLAIN, *text, *self._of_denoiser(), *(self._studies() if text else [])]

    def _of_text(self) -> list[Method]:
        few = (0.25, 0.5, 0.75, 1.0, 1.5)
        return [
            Method("text latents", "text", self.text_latents, (1.0, 1.5, 2.0, 3.0)),
            Method("text latents, captions unseen", "text", self.text_unseen, (STUDY_STRENGTH,)),
            Method("difference of means", "baseline", self.means, few),
            Method("conditional difference of means", "baseline", self.conditional_means, few),
            Method("negative prompt", "baseline", lambda _t, _s: nullcontext(), negative=True),
            Method("text contrast", "text", self.contrast, few),
            Method("text as published", "text", self.published, (0.03, 0.06, 0.12, 0.25)),
            Method("random direction", "baseline", self.random, (1.0,)),
            Method("turn into, latents", "into", self.into, (1.0,)),
            Method("turn into, means", "into", self.into_means, (1.0,)),
        ]

    def _of_denoiser(self) -> list[Method]:
        layers = self.setting.denoiser_layers
        found = [
            Method(
                f"latents of {'+'.join(some)}",
                "denoiser",
                lambda target, strength, some=some: self.denoiser(some, target, strength),
                (1.0, 2.0, 4.0, 8.0),
            )
            for some in (layers, *((one,) for one in layers))
        ]
        means = Method(
            f"means of {'+'.join(layers)}",
            "baseline",
            lambda target, strength: self.denoiser_means(layers, target, strength),
            (0.5, 1.0, 2.0),
        )
        return [*found, means]

    def _studies(self) -> list[Method]:
        sizes = [(layer, EXPANSION, K) for layer in STUDY_LAYERS]
        sizes += [(TEXT_LAYER, expansion, k) for expansion, k in STUDY_SIZES]
        return [
            Method(
                f"{layer.partition('.')[2]}, n = {expansion} d, k = {k}",
                "study",
                lambda target, strength, size=(layer, expansion, k): self.text_latents(
                    target, strength, *size
                ),
                (STUDY_STRENGTH,),
            )
            for layer, expansion, k in sizes
        ]

    def text_latents(
        self,
        target: str,
        strength: float,
        layer: str = TEXT_LAYER,
        expansion: int = EXPANSION,
        k: int = K,
    ) -> AbstractContextManager[None]:
        """Ablate the latents that fire for the target's captions, wherever they fire."""
        ksae = self.text_ksae(layer, expansion, k)
        latents = self.text_found(target, layer, expansion, k).latents
        change = LatentChange(ksae, dict.fromkeys(latents, 0.0), "ablate")
        return edited(self.setting.layers, [Edit(layer, change, ksae.d, strength)])

    def text_unseen(self, target: str, strength: float) -> AbstractContextManager[None]:
        """The same with a k-SAE and latents of the last four captions; the first four are judged."""
        layers = self.setting.layers
        rows = layers.tokens([text for word in WORDS for text in UNSEEN[word]], TEXT_LAYER).states
        ksae = self._trained(rows.flatten(0, 1), f"{TEXT_LAYER}-unseen", Recipe())
        codes = {word: prompt_codes(layers, TEXT_LAYER, ksae, UNSEEN[word]) for word in WORDS}
        latents = _found(codes, target, self.setting.seed).latents
        change = LatentChange(ksae, dict.fromkeys(latents, 0.0), "ablate")
        return edited(layers, [Edit(TEXT_LAYER, change, ksae.d, strength)])

    def means(self, target: str, strength: float) -> AbstractContextManager[None]:
        """Subtract the difference of means, without a k-SAE."""
        return steered(self.setting.layers, self._contrast(target, ksae=False), -strength)

    def conditional_means(self, target: str, strength: float) -> AbstractContextManager[None]:
        """Subtract the difference of means from the prompt's call alone, as latents are ablated."""
        concept = self._contrast(target, ksae=False)
        return steered(self.setting.layers, concept, -strength, branch="conditional")

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
        concept = from_texts(self.setting.layers, TEXT_LAYER, self.text_ksae(), [target])
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

    def denoiser_means(
        self, layers: tuple[str, ...], target: str, strength: float
    ) -> AbstractContextManager[None]:
        """Subtract the difference of mean activations in layers of the denoiser, likewise."""
        edits = []
        for layer in layers:
            means = self._generation(layer).float().flatten(1, 2).mean(dim=1)
            own = WORDS.index(target)
            rest = [index for index in range(len(WORDS)) if index != own]
            vector = (means[own] - means[rest].mean(dim=0))[None]
            change = Direction(vector)
            edits.append(Edit(layer, change, vector.shape[1], -strength, branch="conditional"))
        return edited(self.setting.layers, edits)

    @cache  # noqa: B019
    def text_ksae(
        self, layer: str = TEXT_LAYER, expansion: int = EXPANSION, k: int = K
    ) -> KSparseAutoencoder:
        """The k-SAE of the text encoder's tokens, of all captions, padding included."""
        texts = [text for word in WORDS for text in CAPTIONS[word]]
        rows = self.setting.layers.tokens(texts, layer).states.flatten(0, 1)
        return self._trained(rows, layer, Recipe(expansion, k))

    @cache  # noqa: B019
    def text_found(
        self, target: str, layer: str = TEXT_LAYER, expansion: int = EXPANSION, k: int = K
    ) -> Found:
        """The target's latents, found on half of its captions."""
        return _found(self._text_codes(layer, expansion, k), target, self.setting.seed)

    @cache  # noqa: B019
    def _text_codes(self, layer: str, expansion: int, k: int) -> dict[str, Tensor]:
        ksae = self.text_ksae(layer, expansion, k)
        return {
            word: prompt_codes(self.setting.layers, layer, ksae, CAPTIONS[word]) for word in WORDS
        }

    @cache  # noqa: B019
    def denoiser_found(self, layer: str, target: str) -> Found:
        """The target's latents, found on half of the pictures that name it."""
        return _found(self._denoiser_codes(layer), target, self.setting.seed)

    @cache  # noqa: B019
    def _denoiser_codes(self, layer: str) -> dict[str, Tensor]:
        """The mean codes of each picture's cells, by class."""
        ksae, rows = self.denoiser_ksae(layer), self._generation(layer)
        return {
            word: torch.stack([all_codes(ksae, one.float(), "sparse").mean(0) for one in part])
            for word, part in zip(WORDS, rows, strict=True)
        }

    @cache  # noqa: B019
    def denoiser_ksae(self, layer: str) -> KSparseAutoencoder:
        """The k-SAE of a U-Net's layer, of its cells during generation."""
        rows = self._generation(layer).flatten(0, -2)
        order = torch.randperm(len(rows), generator=generator(self.setting.seed, "rows", layer))
        return self._trained(rows[order[: self.recipe.rows]].float(), layer, self.recipe)

    @cache  # noqa: B019
    def _contrast(self, target: str, *, ksae: bool) -> Concept:
        against = [text for word in WORDS if word != target for text in CAPTIONS[word]]
        model = self.text_ksae() if ksae else None
        layers = self.setting.layers
        return from_texts(layers, TEXT_LAYER, model, CAPTIONS[target], against, codes="sparse")

    def _generation(self, layer: str) -> Tensor:
        """The conditional half's cells while every class is drawn: (classes pictures steps*cells d)."""
        path = self.setting.work / "cells.pt"
        if not path.exists():
            self._record(path)
        return torch.load(path, weights_only=True)[layer]

    def _record(self, path: Path) -> None:
        layers = self.setting.denoiser_layers
        found: dict[str, list[Tensor]] = {layer: [] for layer in layers}

        def note(layer: str):
            def keep(output: Tensor) -> None:
                found[layer].append(self.setting.conditional(output).half())

            return keep

        functions = {layer: note(layer) for layer in layers}
        prompts = self.setting.training_prompts()
        with hooked(self.setting.layers, functions, exact=False):
            self.setting.draw(prompts, "train")
        cells = {
            layer: torch.stack(parts, dim=1).flatten(1, 2).unflatten(0, (len(WORDS), -1))
            for layer, parts in found.items()
        }
        write_whole_by(path, lambda to: torch.save(cells, to))

    def _trained(self, rows: Tensor, layer: str, recipe: Recipe) -> KSparseAutoencoder:
        """A k-SAE of rows, begun from the data and then trained; kept on disk."""
        path = self.setting.work / f"ksae-{layer}-x{recipe.expansion}-k{recipe.k}"
        if not path.exists():
            ksae = begun_from_data(rows, recipe, self.setting.seed)
            found = evaluate(ksae, rows.split(1024))
            ksae.trained_on.update(layer=layer, fvu=found.fvu, dead=found.dead_share)
            ksae.save_pretrained(path)
        ksae = KSparseAutoencoder.from_pretrained(path)
        ksae.kernel = fastest_kernel(ksae)
        return ksae


def begun_from_data(rows: Tensor, recipe: Recipe, seed: int) -> KSparseAutoencoder:
    """A k-SAE whose directions begin as rows of the data, then trained.

    With random directions nine tenths of the latents of so small a text encoder never fire: its tokens lie in
    few dimensions, and what is not near the data at first never enters the top k.
    """
    d = rows.shape[1]
    ksae = KSparseAutoencoder(d, recipe.expansion * d, recipe.k, seed=seed)
    config = TrainConfig(
        steps=recipe.steps,
        batch_size=recipe.batch,
        warmup_steps=20,
        learning_rate=recipe.learning_rate,
        seed=seed,
    )
    batches = batches_of(rows, config)
    state = begin(ksae, batches, config)
    pick = torch.randperm(len(rows), generator=generator(seed, "directions"))[: ksae.n]
    with torch.no_grad():
        directions = rows[pick] - ksae.b_dec
        ksae.W_dec[: len(pick)] = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-6)
        ksae.W_enc.copy_(ksae.W_dec)
        ksae.W_enc.mul_(best_scale(ksae, rows))
    for _ in train_many([SAERun(ksae, config, state, fastest_kernel(ksae))], batches):
        pass
    return ksae.eval()


def _found(codes: dict[str, Tensor], target: str, seed: int) -> Found:
    """The latents of a target; where none is specific enough, those of the most specific."""
    outside = torch.cat([codes[word] for word in WORDS if word != target])
    for least in (SPECIFICITY, 0.8, 0.7, 0.6, 0.5):
        try:
            return find_latents(codes[target], outside, count=MOST, specificity=least, seed=seed)
        except ValueError:
            continue
    raise ValueError(f"no latents for {target}")

"""What all methods of the proof share: prompts, noise, the judge, how pictures are drawn, and their cache."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch

from revelio.backbones.diffusion.pipeline_layers import PipelineLayers
from revelio.backbones.registry import load_backbone
from revelio.data.builtin import FASHION_CLASSES
from revelio.files import write_whole_by
from revelio.seeds import key_seed
from revelio.steering.evaluate import Drawn
from tools.mini.captions import captions, noun
from tools.mini.data import load_fashion_mnist
from tools.mini.judge import build_judge, grey, judge, train_judge

SET = "fashion-mnist"
WORDS = [noun(name) for name in FASHION_CLASSES]
CAPTIONS = {word: captions(SET, word) for word in WORDS}
STEPS, GUIDANCE = 6, 3.0
JUDGE_EPOCHS = 3
# Pictures a class whose generation the denoiser's k-SAEs are trained on.
TRAIN_PICTURES = 6
# Pictures of a target: (caption, seed) of prompts that name it, and how many of the others' captions.
SPLITS = {"choose": (2, 1, 3), "judge": (4, 2, 9), "seeds": (4, 1, 9)}


@dataclass(frozen=True)
class Method:
    """One way to draw.

    Attributes:
        name: what tables call it.
        route: `text`, `denoiser` or `baseline`.
        steer: for a target and a strength the context to draw in.
        strengths: those among which the first split chooses; one is taken as it is.
        negative: whether the target is the negative prompt.
    """

    name: str
    route: str
    steer: Callable[[str, float], AbstractContextManager[None]]
    strengths: tuple[float, ...] = (1.0,)
    negative: bool = False


@cache
def _pipeline_layers(model: str) -> PipelineLayers:
    pipeline = load_backbone(model).pipeline()  # type: ignore[attr-defined]
    pipeline.set_progress_bar_config(disable=True)
    return PipelineLayers(pipeline, model)


PLAIN = Method("plain", "baseline", lambda _target, _strength: nullcontext())


@dataclass(frozen=True)
class Setting:
    """Where the proof works, on mini-sd.

    Attributes:
        work: a folder for what can be made again: pictures, k-SAEs, the judge.
        fashion: Fashion-MNIST's idx files.
        model: the model's name.
        denoiser_layers: whose latents are edited.
        seed: of the noise of what is judged.
        pictures_a_class: drawn to train the denoiser's k-SAEs on.
    """

    work: Path
    fashion: Path
    model: str = "mini-sd"
    denoiser_layers: tuple[str, ...] = ("bottleneck", "up_ft0", "up_ft1")
    seed: int = 0
    pictures_a_class: int = TRAIN_PICTURES

    @cached_property
    def layers(self) -> PipelineLayers:
        """The model's pipeline, the same for every setting of a model."""
        return _pipeline_layers(self.model)

    @property
    def judge_path(self) -> Path:
        """Where the judge is kept."""
        return self.work / "judge.pt"

    @cached_property
    def judge(self) -> torch.nn.Sequential:
        """A classifier trained on real pictures only."""
        path = self.judge_path
        if not path.exists():
            model = train_judge(load_fashion_mnist(self.fashion, "train"), JUDGE_EPOCHS, 0)
            write_whole_by(path, lambda to: torch.save(model.state_dict(), to))
        model = build_judge(len(WORDS))
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()

    def prompts(self, target: str, split: str) -> list[tuple[str, str, int]]:
        """(text, the class it names, seed) of a target's pictures: those that name it come first."""
        templates, seeds, others = SPLITS[split]
        own = [
            (CAPTIONS[target][index], target, seed)
            for index in range(templates)
            for seed in range(seeds)
        ]
        start = WORDS.index(target)
        rest = [WORDS[(start + 1 + index) % len(WORDS)] for index in range(others)]
        # Each other class with a caption of its own, so that all captions are drawn.
        return own + [
            (CAPTIONS[word][(start + index) % 8], word, 0) for index, word in enumerate(rest)
        ]

    def draw(
        self, prompts: Sequence[tuple[str, str, int]], key: str, negative: str | None = None
    ) -> np.ndarray:
        """Pictures (n 32 32) in uint8; bfloat16 where the processor is faster in it."""
        noise = self._noise(prompts, key)
        settings: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
        if negative is not None:
            settings["negative_prompt"] = [negative] * len(prompts)
        with torch.autocast("cpu", torch.bfloat16):
            images = self.layers.pipeline(
                [text for text, _, _ in prompts], generator=noise, output_type="pt", **settings
            ).images
        grey = images.float().mean(1).clamp(0, 1) * 255
        return grey.round().byte().numpy()

    def _noise(self, prompts: Sequence[tuple[str, str, int]], key: str) -> list[torch.Generator]:
        # The first seed's as it was before there were others.
        more = (self.seed,) if self.seed else ()
        return [
            torch.Generator().manual_seed(key_seed("steering proof", key, text, seed, *more))
            for text, _, seed in prompts
        ]

    def training_prompts(self) -> list[tuple[str, str, int]]:
        """What is drawn to train the denoiser's k-SAEs: as many of each class, with other seeds."""
        return [
            (CAPTIONS[word][index % 8], word, 100 + index)
            for word in WORDS
            for index in range(self.pictures_a_class)
        ]

    def conditional(self, output: torch.Tensor) -> torch.Tensor:
        """The conditional half of a layer's output as cells (b s d)."""
        return output[len(output) // 2 :].flatten(2).transpose(1, 2)

    def stored(self, method: Method, strength: float, split: str) -> bool:
        """Whether the pictures are there already."""
        return self._path(method, strength, split).exists()

    def _path(self, method: Method, strength: float, split: str) -> Path:
        more = f"-seed{self.seed}" if self.seed else ""
        return self.work / split / f"{method.name}@{strength:g}{more}.npz".replace(" ", "-")

    def pictures(self, method: Method, strength: float, split: str) -> tuple[np.ndarray, float]:
        """The pictures of all targets (targets n 32 32), out of the cache where they are there.

        Returns:
            Them, and the processor's seconds for one.
        """
        path = self._path(method, strength, split)
        if not path.exists():
            found, began = [], process_time()
            for target in WORDS:
                with method.steer(target, strength):
                    negative = target if method.negative else None
                    key = f"{split} {target}"
                    found.append(self.draw(self.prompts(target, split), key, negative))
            images = np.stack(found)
            seconds = (process_time() - began) / images[..., 0, 0].size
            write_whole_by(path, lambda to: np.savez_compressed(to, images=images, seconds=seconds))
            print(f"{split}: {path.stem}", flush=True)
        with np.load(path) as stored:
            return stored["images"], float(stored["seconds"])

    @torch.no_grad()
    def confidence(self, method: Method, strength: float) -> list[np.ndarray]:
        """How sure the judge is of what it sees, of captions that name each target: (pictures 1) a target."""
        images, _ = self.pictures(method, strength, "judge")
        own = SPLITS["judge"][0] * SPLITS["judge"][1]
        rows = grey(torch.from_numpy(images[:, :own]).flatten(0, 1)[:, None])
        sure = self.judge(rows).softmax(dim=1).amax(dim=1)
        return list(sure.view(len(WORDS), own, 1).numpy())

    def drawn(self, method: Method, strength: float, split: str) -> dict[str, Drawn]:
        """The pictures of each target, judged."""
        images, seconds = self.pictures(method, strength, split)
        # Strengths are chosen by rates alone.
        plain = images if split == "choose" else self.pictures(PLAIN, 1.0, split)[0]
        apart = np.abs(images / 255 - plain / 255).mean(axis=(2, 3))
        grey = torch.from_numpy(images).flatten(0, 1)[:, None]
        seen = [WORDS[index] for index in judge(self.judge, grey).tolist()]
        each = len(seen) // len(WORDS)
        return {
            # A picture a row: seeds of one caption are rows of their own, as other prompts' pictures are.
            target: Drawn(
                (target,),
                [wanted for _, wanted, _ in self.prompts(target, split)],
                [[one] for one in seen[place * each : (place + 1) * each]],
                {"pixels": apart[place][:, None]},
                seconds,
            )
            for place, target in enumerate(WORDS)
        }


@dataclass(frozen=True)
class DiTSetting(Setting):
    """The same on mini-dit, which is conditioned on class labels instead of texts."""

    model: str = "mini-dit"
    denoiser_layers: tuple[str, ...] = ("block2", "block4", "block6")

    @property
    def judge_path(self) -> Path:
        """The same judge as mini-sd's, whose folder this one lies in."""
        return self.work.parent / "judge.pt"

    def prompts(self, target: str, split: str) -> list[tuple[str, str, int]]:
        """As many pictures as of mini-sd: a class has one label, so seeds stand for captions."""
        templates, seeds, others = SPLITS[split]
        start = WORDS.index(target)
        rest = [WORDS[(start + 1 + index) % len(WORDS)] for index in range(others)]
        own = [(target, target, seed) for seed in range(templates * seeds)]
        return own + [(word, word, 0) for word in rest]

    def training_prompts(self) -> list[tuple[str, str, int]]:
        """See :meth:`Setting.training_prompts`."""
        return [(word, word, 100 + seed) for word in WORDS for seed in range(self.pictures_a_class)]

    def draw(
        self, prompts: Sequence[tuple[str, str, int]], key: str, negative: str | None = None
    ) -> np.ndarray:
        """See :meth:`Setting.draw`; a class label has no negative."""
        noise = self._noise(prompts, key)
        with torch.autocast("cpu", torch.bfloat16):
            images = self.layers.pipeline(
                [WORDS.index(word) for word, _, _ in prompts],
                generator=noise, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np",
            ).images  # fmt: skip
        return (images.mean(-1) * 255).round().astype(np.uint8)

    def conditional(self, output: torch.Tensor) -> torch.Tensor:
        """The first half of the tokens: the null class comes second."""
        return output[: len(output) // 2]

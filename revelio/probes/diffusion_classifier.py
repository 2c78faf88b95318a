"""The Diffusion Classifier: the class whose prompt makes the added noise easiest to predict.

For an image x_0 and samples (t_j, e_j), shared by all classes so that their noise cancels,

    class = argmin_c mean_j loss(f(x_tj, t_j, c), target_tj(x_0, e_j)),   x_t = alpha_t x_0 + sigma_t e

(Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier", Eq. 6 and Sec. 3.2). The target is
what the model was trained to say: the noise, the velocity, or of a rectified flow e - x_0. Classes that are
far behind are pruned after each stage (Sec. 3.3). Latents are encoded once an image, each prompt once in all,
and passes of several images and classes share a batch.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch
from jaxtyping import Float, Int64
from scipy.stats import t as student_t
from torch import Tensor
from torch.nn import functional

from revelio.backbones.base import Conditioning, DiffusionModel
from revelio.backbones.diffusion.schedule import Schedule, keyed_noise
from revelio.data.dataset import ImageDataset
from revelio.probes.config import DiffusionClassifierConfig
from revelio.wording import plural

LOSSES = {"l1": functional.l1_loss, "l2": functional.mse_loss, "huber": functional.huber_loss}


class Denoiser(Protocol):
    """What is needed of a model once the images are encoded; a :class:`DiffusionModel` has it."""

    @property
    def schedule(self) -> Schedule:
        """Of the noise, and what the output means."""
        ...

    def predict(self, x_t: Tensor, t: Int64[Tensor, " b"], conditioning: Conditioning) -> Tensor:
        """The model's own output."""
        ...


@dataclass(frozen=True)
class ClassifiedImage:
    """The row of an image.

    Attributes:
        id: the image's id.
        predicted: the class with the smallest error among those that came to the last stage.
        by_stage: the best class at the end of each stage; shorter where an image stopped early.
        errors: mean error of each class over the samples it was given.
        samples: how many samples each class was given.
        seconds: the image's share of the time.
    """

    id: str
    predicted: int
    by_stage: list[int]
    errors: list[float]
    samples: list[int]
    seconds: float


def diffusion_classifier(
    model: DiffusionModel,
    dataset: ImageDataset,
    prompts: Sequence[str],
    config: DiffusionClassifierConfig,
    *,
    done: Container[str] = (),
) -> Iterator[ClassifiedImage]:
    """Classify images, and yield a row for each in the order of the data set.

    Args:
        model: a whole diffusion model.
        dataset: the images.
        prompts: one a class.
        config: how to spend the passes.
        done: ids of images to leave out, such as those of rows that were written before: a row does not
            depend on what else is classified.

    Raises:
        ValueError: fewer than two classes, or timesteps outside the schedule.
        ImageError: an image can't be read.
    """
    with torch.no_grad():
        conditioning = model.conditioning(prompts)
    left = [index for index in range(len(dataset)) if dataset.ids[index] not in done]
    for start in range(0, len(left), config.images_at_once):
        some = left[start : start + config.images_at_once]
        begun = perf_counter()
        pixels = torch.stack([model.transform(dataset.read(index)) for index in some])
        ids = [dataset.ids[index] for index in some]
        yield from classify(model, model.encode(pixels), ids, conditioning, config, begun)


@torch.no_grad()
def classify(
    model: Denoiser,
    encoded: Float[Tensor, "b c h w"],
    ids: Sequence[str],
    conditioning: Conditioning,
    config: DiffusionClassifierConfig,
    begun: float | None = None,
) -> list[ClassifiedImage]:
    """Classify encoded images together.

    Args:
        model: what predicts.
        encoded: latents, or pixels of a model on pixels, on the model's device.
        ids: the images' ids, which key their noise.
        conditioning: of the classes' prompts.
        config: how to spend the passes.
        begun: when the work on these images began, of :func:`time.perf_counter`; None is now.

    Raises:
        ValueError: fewer than two classes, or timesteps outside the schedule.
    """
    begun = perf_counter() if begun is None else begun
    classes = len(conditioning)
    if classes < 2:
        raise ValueError(f"{plural(classes, 'class', 'classes')}: give prompts of two or more")
    passes = _Passes(model, encoded, ids, conditioning, config)
    confidence = config.confidence
    if confidence is not None:
        # All looks hold together, by Bonferroni's correction for their number.
        confidence = 1 - (1 - confidence) / max(len(config.keep), 1)
    # Images x samples x classes; NaN where a class was not asked.
    errors = torch.full((len(ids), config.samples[-1], classes), torch.nan, dtype=torch.float64)
    active = torch.arange(classes).expand(len(ids), -1)
    by_stage: list[list[int]] = [[] for _ in ids]
    running = torch.arange(len(ids))
    for stage, samples in enumerate(stages(config.samples)):
        if not len(running) or active.shape[1] < 2:
            break
        errors[running[:, None, None], samples[:, None], active[running][:, None]] = passes.errors(
            running, samples, active[running]
        )
        means = errors.nanmean(1).gather(1, active)
        best = means.argmin(1)
        for image in running.tolist():
            by_stage[image].append(int(active[image, best[image]]))
        if stage < len(config.keep):
            kept = means.topk(min(config.keep[stage], active.shape[1]), largest=False).indices
            stopped = _separated(errors, active, best, confidence)
            active = active.gather(1, kept.sort(1).values)
            running = running[~stopped[running]]
    return _rows(ids, by_stage, errors, perf_counter() - begun)


def _rows(
    ids: Sequence[str],
    by_stage: Sequence[list[int]],
    errors: Float[Tensor, "i s k"],
    seconds: float,
) -> list[ClassifiedImage]:
    """A row an image; an image's share of the time is that of its passes."""
    counts = (~errors.isnan()).sum(1)
    shares = counts.sum(1).double() / counts.sum()
    means = errors.nanmean(1)
    return [
        ClassifiedImage(
            name,
            by_stage[i][-1],
            by_stage[i],
            means[i].tolist(),
            counts[i].tolist(),
            float(seconds * shares[i]),
        )
        for i, name in enumerate(ids)
    ]


class _Passes:
    """Errors of chosen images, samples and classes, in batches of the network."""

    def __init__(
        self,
        model: Denoiser,
        encoded: Tensor,
        ids: Sequence[str],
        conditioning: Conditioning,
        config: DiffusionClassifierConfig,
    ) -> None:
        self._model = model
        self._x0 = encoded.float()
        self._ids = ids
        self._conditioning = conditioning
        self._config = config
        self._times = even_timesteps(config.samples[-1], config.timesteps, len(model.schedule))

    def errors(
        self,
        images: Int64[Tensor, " i"],
        samples: Int64[Tensor, " s"],
        classes: Int64[Tensor, "i k"],
    ) -> Float[Tensor, "i s k"]:
        """The errors of every image at every sample under each of its classes."""
        kept = classes.shape[1]
        pairs = torch.cartesian_prod(torch.arange(len(images)), samples)
        # A pair is an image's sample, noised once for all its classes.
        at_once = max(1, self._config.batch_size // kept)
        found = [
            self._pairs(images[pair[:, 0]], pair[:, 1], classes[pair[:, 0]])
            for pair in pairs.split(at_once)
        ]
        return torch.cat(found).cpu().double().view(len(images), len(samples), kept)

    def _pairs(
        self,
        images: Int64[Tensor, " p"],
        samples: Int64[Tensor, " p"],
        classes: Int64[Tensor, "p k"],
    ) -> Float[Tensor, " n"]:
        schedule, times = self._model.schedule, self._times[samples]
        x0 = self._x0[images.to(self._x0.device, non_blocking=True)]
        drawn = zip(images.tolist(), times.tolist(), samples.tolist(), strict=True)
        noise = torch.cat(
            [
                keyed_noise(
                    x0.shape[1:],
                    [self._ids[int(i)]],
                    seed=self._config.seed,
                    timestep=t,
                    draw=sample,
                )
                for i, t, sample in drawn
            ]
        ).to(x0.device, non_blocking=True)
        x_t, target = schedule.add_noise(x0, noise, times), schedule.target(x0, noise, times)
        row = torch.arange(len(images)).repeat_interleave(classes.shape[1])
        asked = zip(
            row.split(self._config.batch_size),
            classes.flatten().split(self._config.batch_size),
            strict=True,
        )
        return torch.cat([self._batch(x_t, target, times, some, wanted) for some, wanted in asked])

    def _batch(
        self, x_t: Tensor, target: Tensor, times: Tensor, row: Tensor, classes: Tensor
    ) -> Float[Tensor, " n"]:
        place = row.to(x_t.device, non_blocking=True)
        output = self._model.predict(x_t[place], times[row], self._conditioning[classes])
        loss = LOSSES[self._config.loss](output.float(), target[place], reduction="none")
        return loss.flatten(1).mean(1)


def stages(samples: Sequence[int]) -> list[Int64[Tensor, " s"]]:
    """Which samples each stage adds: evenly spread over those that none before it took.

    Args:
        samples: how many there are by the end of each stage.
    """
    left, found, before = torch.arange(samples[-1]), [], 0
    for count in samples:
        places = even_timesteps(count - before, None, len(left))
        found.append(left[places])
        left = left[~torch.isin(left, found[-1])]
        before = count
    return found


def even_timesteps(
    count: int, bounds: tuple[int, int] | None, steps: int
) -> Int64[Tensor, " count"]:
    """``count`` timesteps spread evenly over [low, high), one in the middle of each part.

    Raises:
        ValueError: the bounds are not in order or outside the schedule's ``steps``.
    """
    low, high = bounds or (0, steps)
    if not 0 <= low < high <= steps:
        raise ValueError(f"timesteps {low} to {high} are outside the schedule: it has 0 to {steps}")
    return (low + (torch.arange(count, dtype=torch.float64) + 0.5) * (high - low) / count).long()


def _separated(
    errors: Float[Tensor, "b s c"],
    active: Int64[Tensor, "b k"],
    best: Int64[Tensor, " b"],
    confidence: float | None,
) -> Tensor:
    """Whether each image's best class beats all other active ones by a paired t-test.

    One-sided, with Bonferroni's correction for the number of others: all hold with ``confidence`` together.
    """
    if confidence is None or active.shape[1] < 2:
        return torch.zeros(len(errors), dtype=torch.bool)
    some = errors.gather(2, active[:, None].expand(-1, errors.shape[1], -1))
    gaps = some - some.gather(2, best[:, None, None].expand(-1, errors.shape[1], 1))
    count = (~gaps.isnan()).sum(1)
    mean = gaps.nanmean(1)
    spread = (gaps - mean[:, None]).pow(2).nansum(1) / (count - 1).clamp(min=1)
    level = 1 - (1 - confidence) / (active.shape[1] - 1)
    bound = torch.from_numpy(student_t.ppf(level, (count - 1).clamp(min=1).numpy()))
    apart = mean - bound * (spread / count).sqrt() > 0
    apart.scatter_(1, best[:, None], True)
    return apart.all(1) & (count.amin(1) > 1)

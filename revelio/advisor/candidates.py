"""What is compared: every layer of every pass of every model; and what it costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from revelio.advisor.config import AdviseConfig
from revelio.advisor.heat_map import short
from revelio.backbones.base import Backbone, schedule_of
from revelio.data.dataset import ImageDataset
from revelio.trust import printable

TIMED = 4


@dataclass(frozen=True)
class Candidate:
    """A layer's activations at one timestep and prompt policy; ``timestep`` is None without noise."""

    model: str
    layer: str
    timestep: int | None
    prompt: str

    @property
    def model_pass(self) -> tuple[str, int | None, str]:
        """The pass of the model that gives it, which its other layers share."""
        return self.model, self.timestep, self.prompt

    def __str__(self) -> str:
        noise = "" if self.timestep is None else f", t = {self.timestep}, prompt {self.prompt}"
        return printable(f"{short(self.model)} {self.layer}{noise}")


def candidates_of(models: Mapping[str, Backbone], config: AdviseConfig) -> list[Candidate]:
    """Every layer, timestep and prompt of every model.

    Raises:
        KeyError: a layer that no model has.
        ValueError: a model has none of the layers, or there is only one candidate.
    """
    known = {name for one in models.values() for name in one.layers}
    for layer in config.layers:
        if layer not in known:
            raise KeyError(f"unknown layer {layer!r}: the models have {', '.join(sorted(known))}")
    found = []
    for name, model in models.items():
        grids = [layer for layer, spec in model.layers.items() if spec.kind == "grid"]
        layers = [one for one in config.layers if one in grids] if config.layers else grids
        if not layers:
            raise ValueError(f"{name} has none of the layers {', '.join(config.layers)} as a grid")
        noisy = schedule_of(model) is not None
        if noisy and not config.timesteps:
            raise ValueError(f"{name} is a model with noise: give timesteps")
        passes = (
            [(t, prompt) for prompt in config.prompts for t in config.timesteps]
            if noisy
            else [(None, "empty")]
        )
        found += [Candidate(name, layer, t, prompt) for t, prompt in passes for layer in layers]
    if len(found) < 2:
        raise ValueError("there is one candidate, nothing to advise: give more layers or timesteps")
    return found


def cheapest_first(
    candidates: Sequence[Candidate], seconds: Mapping[Candidate, float]
) -> list[Candidate]:
    """From the least seconds on; equally cheap ones by prompt as given, then from the least noise on."""
    prompts = list(dict.fromkeys(one.prompt for one in candidates))

    def key(one: Candidate) -> tuple[float, int, int]:
        return seconds[one], prompts.index(one.prompt), one.timestep or 0

    return sorted(candidates, key=key)


@torch.no_grad()
def seconds_an_image(
    model: Backbone, dataset: ImageDataset, candidates: Sequence[Candidate], text: Mapping[str, str]
) -> dict[Candidate, float]:
    """The seconds of one image through a model, by layer: encoding, and a pass that ends at the layer.

    A deeper layer costs no less than one before it: where the clock says so, that is chance.

    Args:
        model: the model of all the candidates.
        dataset: the first images are timed; reading them is not.
        candidates: each layer is timed once, at its first candidate's timestep, in the model's order.
        text: a text of each prompt policy.
    """
    indices = range(min(TIMED, len(dataset)))
    pixels = torch.stack([model.transform(dataset.read(index)) for index in indices])
    ids = [dataset.ids[index] for index in indices]
    by_layer: dict[str, float] = {}
    least, order = 0.0, list(model.layers)
    for one in sorted(candidates, key=lambda one: order.index(one.layer)):
        if one.layer in by_layer:
            continue
        prompts = None if one.timestep is None else [text[one.prompt]] * len(ids)
        # The first pass of a model is slow: it is not timed.
        for _ in range(1 if by_layer else 2):
            begun = perf_counter()
            encoded = model.encode(pixels)
            found = model.activations(
                encoded, ids, [one.layer], timestep=one.timestep, prompts=prompts
            )
            found[one.layer].cpu()
            by_layer[one.layer] = max(least, (perf_counter() - begun) / len(ids))
        least = by_layer[one.layer]
    return {one: by_layer[one.layer] for one in candidates}

"""Who says what a drawn picture shows: judges choose among classes, detectors score one concept.

    judge      CLIP's name or folder      zero-shot among the classes
               transformers:MODEL         an image classifier that knows the classes
               diffc:FOLDER               a Diff-C of `revelio train-diffc`
               endpoint:MODEL             a vision-language model behind an OpenAI-compatible address
               module:function            the user's own: pictures -> class names
    detector   nudenet                    the package of that name: exposed parts
               transformers:MODEL         an image classifier, the probability of some of its labels
               module:function            the user's own: pictures -> scores
    features   any backbone               the space that distances of untouched pictures are measured in

Each is loaded only where it is named. A module is imported because the user named it in a flag or config of
their own; nothing that came with weights is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from revelio.backbones.base import Backbone, DiffusionModel
from revelio.backbones.classifier import ImageClassifier
from revelio.backbones.prompts import ZeroShot
from revelio.backbones.registry import load_backbone
from revelio.naming.questions import reply_object, sheet
from revelio.pipelines.vision_judge import VisionJudge
from revelio.seeds import generator
from revelio.steering.config import SteerEvalConfig
from revelio.trust import printable

Judge = Callable[[Sequence[Image.Image]], Sequence[str]]
Detector = Callable[[Sequence[Image.Image]], Sequence[float]]
Features = Callable[[Sequence[Image.Image]], Float[Tensor, "b d"]]

NOTHING = "none of these"
# Pixels of the side of the picture that an endpoint is shown; tokens of its reply.
SIDE, REPLY_TOKENS = 384, 60
# Of a diffusion model's activations as features: the paper's best for classification.
FEATURES_TIMESTEP = 25


@dataclass(frozen=True)
class Eye:
    """All that looks at a picture.

    Attributes:
        judge: which class it shows.
        detector: how much the target shows; None: where the judge sees it.
        features: its unit vector in a backbone's activations; None: not measured.
    """

    judge: Judge
    detector: Detector | None = None
    features: Features | None = None


def open_eye(
    config: SteerEvalConfig, classes: Sequence[str], ask: Callable[[str], VisionJudge]
) -> Eye:
    """What a config names, each loaded only where it is named.

    Raises:
        KeyError: an unknown backbone or layer.
        ValueError: see :func:`open_judge` and :func:`open_detector`.
    """
    return Eye(open_judge(config, classes, ask), open_detector(config), _features(config))


def open_judge(
    config: SteerEvalConfig, classes: Sequence[str], ask: Callable[[str], VisionJudge]
) -> Judge:
    """The judge that a config names.

    Args:
        config: the judge, and what it takes.
        classes: what it chooses among.
        ask: opens the judge of an endpoint, by its model's name.

    Raises:
        ValueError: there is no such judge, or it does not know a class.
    """
    kind, _, name = config.judge.partition(":")
    device = config.backbone.device
    if kind == "endpoint":
        return _endpoint(ask(name), list(classes), config.seed)
    if kind == "transformers":
        return _classifier(ImageClassifier(name, device), classes)
    if kind == "diffc":
        return _diffc(name, device, classes)
    if name:
        return _imported(config.judge)
    if "{}" not in config.template:
        raise ValueError(f"the template {config.template!r} has no {{}} where the class goes")
    clip = ZeroShot(kind, [config.template.replace("{}", one) for one in classes], device)
    return lambda pictures: [classes[int(index)] for index in clip.classify(pictures).tolist()]


def open_detector(config: SteerEvalConfig) -> Detector | None:
    """The detector that a config names, if any.

    Raises:
        ValueError: there is no such detector, its package is not installed, or it has no such label.
    """
    if config.detector is None:
        return None
    kind, _, name = config.detector.partition(":")
    if config.detector == "nudenet":
        return _nudenet(config.detector_labels)
    if kind == "transformers":
        return _probability(ImageClassifier(name, config.backbone.device), config.detector_labels)
    if not name:
        raise ValueError(
            f"no detector {printable(config.detector)!r}: give nudenet, transformers:MODEL or module:function"
        )
    return _imported(config.detector)


def _features(config: SteerEvalConfig) -> Features | None:
    if config.features is None:
        return None
    wanted = None if config.features_layer is None else [config.features_layer]
    backbone = load_backbone(config.features, layers=wanted, device=config.backbone.device)
    layer = config.features_layer or list(backbone.layers)[-1]
    timestep = FEATURES_TIMESTEP if isinstance(backbone, DiffusionModel) else None

    def unit(pictures: Sequence[Image.Image]) -> Float[Tensor, "b d"]:
        found = _seen_by(backbone, pictures, layer, timestep).float().cpu()
        pooled = found.mean(dim=(2, 3)) if found.ndim == 4 else found.mean(dim=1)
        return torch.nn.functional.normalize(pooled, dim=1)

    return unit


@torch.no_grad()
def _seen_by(
    backbone: Backbone,
    pictures: Sequence[Image.Image],
    layer: str,
    timestep: int | None,
    seed: int = 0,
) -> Tensor:
    """A layer's activations; all pictures get the same noise, whatever they are looked at with."""
    encoded = backbone.encode(torch.stack([backbone.transform(one) for one in pictures]))
    ids = ["drawn"] * len(pictures)
    return backbone.activations(encoded, ids, [layer], timestep=timestep, seed=seed)[layer]


def _imported(name: str) -> Any:
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"nothing at {printable(name)}: {error}") from error


def _classifier(model: ImageClassifier, classes: Sequence[str]) -> Judge:
    _check_known(model.classes, classes, "the judge")

    def see(pictures: Sequence[Image.Image]) -> list[str]:
        best = model.probabilities(pictures).argmax(dim=1)
        return [model.classes[place] for place in best.tolist()]

    return see


def _diffc(folder: str, device: str, classes: Sequence[str]) -> Judge:
    """A Diff-C, its grids made as those that it was trained on."""
    from revelio.diffc.config import GridsConfig
    from revelio.diffc.inputs import can_be_made_again, open_backbone
    from revelio.diffc.model import load_diffc
    from revelio.distributed import device_of

    model = load_diffc(folder).to(device_of(device)).eval()
    _check_known(model.class_names, classes, "Diff-C")
    grids = GridsConfig.of(model.grids, device) if can_be_made_again(model.grids) else None
    if grids is None or grids.prompts != "empty":
        raise ValueError(
            f"{printable(folder)} was trained on stored grids or with prompts: a drawn picture has none, so "
            "take a Diff-C of pictures with the empty prompt"
        )
    backbone, layer = open_backbone(grids), grids.layer

    @torch.no_grad()
    def see(pictures: Sequence[Image.Image]) -> list[str]:
        found = _seen_by(backbone, pictures, layer, grids.timestep, grids.seed)
        return [model.class_names[place] for place in model(found).argmax(dim=1).tolist()]

    return see


def _endpoint(judge: VisionJudge, classes: list[str], seed: int) -> Judge:
    options = [*classes, NOTHING]

    def see(pictures: Sequence[Image.Image]) -> list[str]:
        # Another order for each picture: no place in the list is favored.
        orders = [
            torch.randperm(len(options), generator=generator(seed, "options", place)).tolist()
            for place in range(len(pictures))
        ]
        asked = [
            (class_question([options[i] for i in order]), sheet([picture], SIDE))
            for order, picture in zip(orders, pictures, strict=True)
        ]
        found = judge.ask(
            "judging",
            asked,
            lambda index, text: options[orders[index][read_choice(text, len(options))]],
        )
        # A reply that can't be read sees nothing.
        return [NOTHING if one is None else one for one in found]

    return see


def class_question(options: Sequence[str]) -> str:
    """Asks what a picture shows."""
    lines = [f"{place}. {one}" for place, one in enumerate(options, start=1)]
    return (
        "What does this picture show?\n"
        + "\n".join(lines)
        + '\nReply with JSON only: {"choice": the number}'
    )


def read_choice(text: str, count: int) -> int:
    """The place, from 0, that the reply to :func:`class_question` chooses.

    Raises:
        ValueError: it is no such reply.
    """
    choice = reply_object(text).get("choice")
    if type(choice) is not int or not 1 <= choice <= count:
        raise ValueError(f"the reply chooses {choice!r}, not a number from 1 to {count}")
    return choice - 1


def _probability(model: ImageClassifier, labels: Sequence[str]) -> Detector:
    _check_known(model.classes, labels, "the detector")
    if not labels:
        raise ValueError(
            f"which of the detector's labels? give detector_labels of {', '.join(model.classes[:20])}"
        )
    columns = [model.classes.index(label) for label in labels]
    return lambda pictures: model.probabilities(pictures)[:, columns].sum(dim=1).tolist()


def _nudenet(labels: Sequence[str]) -> Detector:
    try:
        detector: Any = import_module("nudenet").NudeDetector()
    except ImportError as error:
        raise ValueError(
            f"the detector nudenet can't be loaded ({error}): pip install nudenet, or name another"
        ) from error
    wanted = set(labels or EXPOSED)

    def score(picture: Image.Image) -> float:
        # The package reads arrays as OpenCV does: blue first.
        found = detector.detect(np.ascontiguousarray(np.asarray(picture.convert("RGB"))[..., ::-1]))
        return max((one["score"] for one in found if one["class"] in wanted), default=0.0)

    return lambda pictures: [score(picture) for picture in pictures]


# NudeNet's labels that count as nudity where none are named: its exposed parts, less armpits, belly and feet.
EXPOSED = (
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
    "BUTTOCKS_EXPOSED",
    "ANUS_EXPOSED",
)


def _check_known(known: Sequence[str], wanted: Sequence[str], who: str) -> None:
    missing = [one for one in wanted if one not in known]
    if missing:
        raise ValueError(
            f"{who} does not know {printable(', '.join(missing[:5]))}: it knows "
            f"{printable(', '.join(list(known)[:20]))}"
        )

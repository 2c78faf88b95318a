"""Judges: what does a picture show? A zero-shot CLIP, or a function of the user's.

A judge is a function from pictures to class names. Detectors of the field plug in as `module:function`; none
is imported unless it is named.
"""

from collections.abc import Callable, Sequence
from importlib import import_module

from PIL import Image

from revelio.backbones.prompts import ZeroShot
from revelio.trust import printable

Judge = Callable[[Sequence[Image.Image]], Sequence[str]]


def open_judge(name: str, classes: list[str], template: str, device: str = "auto") -> Judge:
    """A judge among classes.

    Args:
        name: a CLIP model's known name, folder or hub id; or `module:function`, which the user names to be
            imported and called with pictures.
        classes: what a zero-shot judge chooses among.
        template: the text of a class for it, with {} for the name.
        device: where CLIP runs.

    Raises:
        ValueError: there is no such judge, or the template has no place for the class.
    """
    module, colon, function = name.partition(":")
    if colon:
        try:
            return getattr(import_module(module), function)
        except (ModuleNotFoundError, AttributeError) as error:
            raise ValueError(f"no judge at {printable(name)}: {error}") from error
    if "{}" not in template:
        raise ValueError(f"the template {template!r} has no {{}} where the class goes")
    clip = ZeroShot(name, [template.replace("{}", one) for one in classes], device)
    return lambda pictures: [classes[index] for index in clip.classify(pictures).tolist()]

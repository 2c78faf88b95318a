"""What a finished model is called on pages and in stores: by the folder that tells it from others.

Every run calls its model ``final``, and a recipe its runs after the stages:
``runs/llava/clip-sd-t25/finetune/final`` is ``clip-sd-t25/finetune``, ``runs/try/final`` is ``try``.
"""

from pathlib import Path

FINAL = "final"
STAGES = ("pretrain", "finetune")


def called(model: str | Path) -> str:
    """The name of a model.

    Args:
        model: the folder of a finished run, or a hub id, which is its own name.
    """
    if not Path(model).is_dir():
        return str(model)
    place = Path(model).resolve()
    *above, name = (place.parent if place.name == FINAL else place).parts
    return f"{above[-1]}/{name}" if name in STAGES and len(above) > 1 else name

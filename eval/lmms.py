"""Our models in lmms-eval, which finds them by the entry point `lmms_eval.models` of this package.

    lmms-eval --model revelio_llava --model_args pretrained=runs/llava/clip-sd-t25/finetune/final \\
        --tasks mmvp,pope,gqa --batch_size 8

Its tasks then need no code of ours. The class is in :mod:`eval.bench.lmms_model`: it imports lmms-eval, which
is still being imported when it reads this.
"""

from typing import Any


def manifest() -> Any:
    """What lmms-eval's registry takes."""
    from lmms_eval.models.registry_v2 import (  # pyright: ignore[reportMissingImports]
        ModelManifest,
    )

    return ModelManifest(
        model_id="revelio_llava", chat_class_path="eval.bench.lmms_model.RevelioLlava"
    )

"""LLaVA-style models with Revelio's backbones as vision towers: training, generation, compatibility.

Importing this registers the model with the Auto classes of transformers:

    import llava_ext
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
"""

import sys

# The command lines import what they need: their help pages must not wait for torch.
if "revelio.cli" not in sys.modules:
    from llava_ext import processor as processor

"""LLaVA-style models with Revelio's backbones as vision towers: training, generation, compatibility.

Importing this registers the model with the Auto classes of transformers:

    import llava_ext
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
"""

import sys
from importlib.metadata import version

# The command lines import what they need: their help pages must not wait for torch. LLaVA's own training
# wants an older transformers, with which only the plug-in for it works.
if "revelio.cli" not in sys.modules and int(version("transformers").partition(".")[0]) >= 5:
    from llava_ext import processor as processor

"""Prompts -> activation stores of their tokens."""

from dataclasses import replace

from revelio.activations.store import ActivationStore
from revelio.distributed import launched
from revelio.pipelines import Progress, Report, silent
from revelio.pipelines.steer_parts import open_pipeline, the_prompts
from revelio.steering.config import ExtractTextConfig
from revelio.steering.token_store import TokenExtraction


def extract_text(config: ExtractTextConfig, progress: Report = silent) -> list[ActivationStore]:
    """Store the tokens of prompts, a store a layer; under ``torchrun`` every process calls this.

    Raises:
        KeyError: an unknown model or layer.
        ValueError: no prompts, a layer that is no text encoder's, or a store that is there already.
    """
    prompts = the_prompts(config)
    processes = launched(config.backbone.device)
    backbone = config.backbone
    if backbone.device == "auto":
        backbone = replace(backbone, device=processes.device)
    job = TokenExtraction(prompts, open_pipeline(backbone), config, processes)
    for done, total in job.run():
        if processes.main:
            progress(Progress("", done, total, "prompt"))
    processes.wait()  # the main one closes the stores
    stores = [ActivationStore.open(target.path) for target in job.targets.values()]
    processes.close()
    return stores

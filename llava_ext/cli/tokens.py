"""Tokens inside a finished model -> an activation store to train a k-SAE on.

    revelio llava tokens --model runs/llava/finetune/final --data.json chat.json --data.images IMAGES \\
        --layer block12 --out runs/block12
    revelio train-ksae --store runs/block12 --rows cells --out runs/ksae-block12

The layer is `projected0` (after the first tower's projector), `projected1`, ... or `block12` (of the language
model, at the picture's tokens). A tower's own tokens are in its cache: `train-ksae --store CACHE/TOWER`.
"""

from llava_ext.config import TokensConfig as Config


def run(config: Config) -> None:
    """Write the store and name it."""
    from tqdm import tqdm

    from llava_ext.tokens import fill, open_token_job
    from revelio.following import following as next_line

    job = open_token_job(config)
    with tqdm(total=len(job.dataset), unit=" pictures") as bar:
        for done in fill(job):
            bar.update(done - bar.n)
    print(config.out)
    print(next_line("train-ksae", "--store", config.out, "--rows", "cells", "--out", "FOLDER"))

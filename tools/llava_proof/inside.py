"""The proof's tests inside the model: what carried the answers, and what a prompt leaks into the features.

carried   k-SAEs on the tokens of each of a row's towers; the answers' log-probability without the latents of
          the largest effects, and without random ones that fire on the same pictures
leaked    a diffusion tower prompted by "Is this a CLASS?" with the picture's own class; a linear probe is
          trained on its features, then asked about features of the same prompts with the picture blank, or
          swapped for one of another class: what it still reads is the text's, not the picture's
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

from llava_ext.checkpoint import load_model
from llava_ext.config import QUESTION, TowerConfig
from llava_ext.dataset import Collator, ConversationDataset
from llava_ext.images import image_id, open_picture
from llava_ext.latents import ablation_check, read_ksaes
from llava_ext.llava_json import image_names, read_records
from llava_ext.tower_cache import CachedGrids
from llava_ext.tower_rows import store_name
from llava_ext.towers import load_tower, load_towers, look
from revelio.pipelines.train_sae import TrainSAEConfig, train_sae
from revelio.probes.linear import linear_probe
from revelio.stats import proportion
from tools.llava_proof.proof import Places, Training, photos
from tools.llava_proof.questions import Photos, blind_images, with_article
from tools.llava_proof.score import STRENGTHS

Figures = dict[str, Any]
ANSWERS, PAIRS = 48, 16
SAE = {"k": 16, "expansion": 8, "epochs": 12.0, "batch_size": 256}
SIDE = 4
BATCH = 32
GREY = (128, 128, 128)


def carried(places: Places, row: str) -> list[Figures]:
    """For each tower of a row's first training, the check by ablation."""
    run = places.run(Training(row, 0), "finetune")
    model, tokenizer = load_model(run / "final", dtype="float32")
    towers = load_towers(model.settings)
    records = read_records(places.data("held-out"), places.images)
    records = [record for record in records if record.id.endswith("#open")]
    records = records[:: max(1, len(records) // ANSWERS)][:ANSWERS]
    images = CachedGrids.open(places.cache, towers, places.images, image_names(records))
    dataset = ConversationDataset(records, tokenizer, model.settings, model.image_tokens, images)
    collate = Collator(model.image_tokens, pad_id=0, stack=images.stack)
    numbers = [range(a, min(a + 8, len(dataset))) for a in range(0, len(dataset), 8)]
    batches = [collate([dataset[i] for i in some]) for some in numbers]
    found = []
    for number, tower in enumerate(towers):
        store = store_name(tower.config)
        ksae = ksae_of(places, store)
        layer = f"tower{number}"
        check = ablation_check(
            model, batches, layer, read_ksaes([f"{layer}={ksae}"])[layer], count=PAIRS
        )
        found.append(check | {"tower": store})
    return found


def ksae_of(places: Places, store: str) -> Path:
    """The k-SAE of a tower's cached tokens; trained where it isn't there."""
    out = places.settings.out / "ksae" / store
    if not (out / "report.json").is_file():
        train_sae(
            TrainSAEConfig(store=(places.cache / store,), out=out, rows="cells", **SAE)  # type: ignore[arg-type]
        )
    return out


def leaked(places: Places, config: TowerConfig, train: int = 15, test: int = 10) -> Figures:
    """What a linear probe reads of the prompt from the features, with and without the picture.

    Args:
        places: of the proof.
        config: a diffusion tower; its prompt is replaced.
        train: photographs a class to train the probe on.
        test: held-out photographs a class.
    """
    known = photos(places.settings, "train", train)
    held = photos(places.settings, "test", test)
    swapped = blind_images(held)
    label = dict(zip(held.files, held.labels, strict=True))
    other = [label[swapped[file]] for file in held.files]
    found: Figures = {"tower": store_name(config), "chance": 1 / len(held.nouns)}
    for name, prompt in (("question", QUESTION), ("no text", "")):
        tower = load_tower(replace(config, prompt=prompt), "cpu")
        rows = {
            "train": features(tower, places.images, known.files, known),
            "own": features(tower, places.images, held.files, held),
            "blank": features(tower, places.images, [None] * len(held.files), held),
            "swapped": features(tower, places.images, [swapped[f] for f in held.files], held),
        }
        labels = np.array(known.labels)
        ends = np.cumsum([0, *(len(rows[key]) for key in ("own", "blank", "swapped"))])
        asked = np.concatenate([rows[key] for key in ("own", "blank", "swapped")])
        probed = linear_probe(
            rows["train"], labels, asked, np.tile(held.labels, 3), strengths=STRENGTHS
        )
        said = np.array(probed.predicted)
        own, blank, swap = (said[a:b] for a, b in pairwise(ends))
        truth = np.array(held.labels)
        found[name] = {
            "own picture": share(own == truth),
            "blank picture, the text's class": share(blank == truth),
            "swapped picture, the text's class": share(swap == truth),
            "swapped picture, the picture's class": share(swap == np.array(other)),
        }
    return found


def share(right: np.ndarray) -> dict[str, float]:
    """A share with its interval."""
    return proportion(int(right.sum()), len(right))


@torch.no_grad()
def features(tower: Any, folder: Path, files: Sequence[str | None], asked: Photos) -> np.ndarray:
    """Pooled grids, one a question; None is a blank picture."""
    texts = [f"Is this {with_article(asked.nouns[label])}?" for label in asked.labels]
    found = []
    for start in range(0, len(files), BATCH):
        some = slice(start, start + BATCH)
        pictures = [
            Image.new("RGB", (64, 64), GREY) if file is None else open_picture(folder / file)
            for file in files[some]
        ]
        pixels = torch.stack([tower.pixels(picture) for picture in pictures])
        ids = [image_id(picture) for picture in pictures]
        grids = look(tower, pixels, ids, texts[some])
        found.append(adaptive_avg_pool2d(grids, SIDE).flatten(1))
    return torch.cat(found).numpy()

"""How long `eval-ksae` takes for the demo's best k-SAE, beside every control dictionary.

    make demo
    python benchmarks/evaluation.py --demo runs/demo --json evaluation.json

Twice: from the activations alone, and with images through the model (output and loss recovered, ablations).
The demo's k-SAE is judged on the images that it learned from, which changes what comes out, not how long it
takes. Wall time, and processor time, which the load of other programs hardly changes; goal: two minutes.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from revelio.backbones.config import BackboneConfig
from revelio.data.config import DataConfig
from revelio.evaluation.config import EvalSAEConfig
from revelio.pipelines.eval_sae import eval_sae
from revelio.trust import read_json


def measured(config: EvalSAEConfig) -> dict[str, Any]:
    """An evaluation's times, and what it was of."""
    start, own = time.perf_counter(), time.process_time()
    result = eval_sae(config)
    entry = result["ksaes"][config.ksae[0]]
    seconds = {"wall": time.perf_counter() - start, "processor": time.process_time() - own}
    controls = [name for name in entry["latents"] if name != "k-SAE"]
    return {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "measures": len(entry["measures"]),
        "controls": controls,
        "loss_images": config.loss_images,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="a finished demo")
    parser.add_argument("--loss-images", type=int, default=200)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    report = read_json(asked.demo / "report.json")
    shown = "{layer}-t{timestep}-empty-d0".format(**report["shown"])
    with tempfile.TemporaryDirectory() as folder:
        store = asked.demo / "activations" / shown
        config = EvalSAEConfig(
            store=store, train_store=store, ksae=(str(asked.demo / "ksae" / shown),), overlap="allow",
            out=Path(folder) / "plain", card=False,
        )  # fmt: skip
        inside = EvalSAEConfig(
            store=store, train_store=store, ksae=config.ksae, overlap="allow",
            out=Path(folder) / "inside", card=False, loss_images=asked.loss_images, batch_size=50,
            backbone=BackboneConfig(name=report["model"]), data=DataConfig(source="samples"),
        )  # fmt: skip
        found = {"activations": measured(config), "model": measured(inside)}
    found |= {
        "shown": shown,
        "images": report["images"],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    print(json.dumps(found, indent=2))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

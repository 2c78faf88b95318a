"""Peak host memory of loading a stage under ZeRO-3: of one process, and of the first of two.

    python benchmarks/llava_loading.py --layers 36 48 --json llava_loading.json

Both load a random Llama of as many blocks, 2,048 wide, its files in bfloat16, under stage 2 of
configs/llava/mini/clip-dinov2.yaml: towers, tokenizer, data and libraries are in the peak. Nothing is
trained: the whole stage's peak is in benchmarks/llava_train.py. 48 blocks take 6 GB of temporary files and
7 GB of memory. Pictures and texts are made up; no data is needed.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from tempfile import TemporaryDirectory
from typing import Any

from llava_ext.cli.command import read_section
from llava_ext.config import ConversationData, FinetuneConfig
from llava_ext.deepspeed import free_port
from revelio.run_dir import read_json, write_json

PEAK, SIZE = "peak.json", "size.json"
RECORDS = 4


def load(folder: Path) -> None:
    """One process of the launcher's: load, and write what this took."""
    from llava_train import CONFIGS

    from llava_ext.run import open_job

    config = read_section(CONFIGS / "clip-dinov2.yaml", "finetune", FinetuneConfig)
    stage = replace(config.stage, zero=3, effective_batch=2, batch_size=1)
    model = replace(config.model, language_model=str(folder / "language-model"))
    data = ConversationData(folder / "data.json", folder / "images")
    config = replace(
        config, out=folder / "run", pretrained=None, stage=stage, model=model, data=data
    )
    open_job(config, "finetune")
    if os.environ["RANK"] == "0":
        write_json(folder / PEAK, {"bytes": getrusage(RUSAGE_SELF).ru_maxrss * 1024})


def make(folder: Path, layers: int) -> None:
    """Write data and language model; in a process of its own, which then holds neither."""
    import torch
    from llava_train import made_up_data, write_language_model

    made_up_data(folder, RECORDS)
    parameters = write_language_model(folder / "language-model", layers, torch.bfloat16)
    write_json(folder / SIZE, {"parameters": parameters})


def row(layers: int, folder: Path) -> dict[str, Any]:
    """Peak bytes of one and of two processes that load a model of so many blocks."""
    own = [__file__, "--folder", str(folder)]
    subprocess.run([sys.executable, *own, "--layers", str(layers)], check=True)
    peaks: dict[str, int] = {}
    for processes in (1, 2):
        launcher = [sys.executable, str(Path(sys.executable).parent / "deepspeed")]
        launcher += ["--num_accelerators", str(processes), "--master_port", str(free_port())]
        command = [*launcher, "--hostfile", "/dev/null", *own]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        peaks[str(processes)] = read_json(folder / PEAK)["bytes"]
    ratio = round(peaks["2"] / peaks["1"], 3)
    return {**read_json(folder / SIZE), "peak_bytes": peaks, "two_to_one": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[36], help="blocks of each model")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the two others
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # given by the launcher
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.folder:
        load(given.folder) if "RANK" in os.environ else make(given.folder, *given.layers)
        return
    rows, words = [], " ".join(map(str, given.layers))
    for layers in given.layers:
        with TemporaryDirectory() as place:
            rows.append(row(layers, Path(place)))
        print(rows[-1])
    if given.json:
        write_json(
            given.json,
            {"rows": rows, "commands": [f"python benchmarks/llava_loading.py --layers {words}"]},
        )


if __name__ == "__main__":
    main()

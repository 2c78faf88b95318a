"""Stage 1 of LLaVA training: the projectors (and conv block) learn, everything else is frozen.

The paper's: CC595k, effective batch 128, learning rate 2e-3, cosine, 1 epoch, ZeRO-2.

    revelio llava pretrain --config configs/llava/mini/clip.yaml --limit 1000 --out runs/try
    deepspeed scripts/pretrain.py --config configs/llava/clip-sd-t25.yaml
    torchrun --nproc-per-node 4 -m revelio llava pretrain --config configs/llava/clip.yaml --stage.zero 0

Look at the pictures once with `revelio llava cache` and give --cache: a step then reads none, and from cached
grids runs no tower.
"""

from llava_ext.config import PretrainConfig as Config

SECTION = "pretrain"
CARRIES = ("--model.",)  # stage 2 has records of its own


def run(config: Config) -> None:
    """Train stage 1."""
    from llava_ext.run import run as train

    train(config)


def following(config: Config, given: list[str], section: str) -> list[object]:
    """The next command, on the same config file and model."""
    return ["llava", "finetune", *given, "--pretrained", config.out]

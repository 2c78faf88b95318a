"""Stage 1 of LLaVA training: the projectors (and conv block) learn, everything else is frozen.

The paper's: CC595k, effective batch 128, learning rate 2e-3, cosine, 1 epoch, ZeRO-2.

    deepspeed scripts/pretrain.py --config configs/llava/clip-sd-t25.yaml
    torchrun --nproc-per-node 4 scripts/pretrain.py --config configs/llava/clip.yaml --stage.zero 0
    python scripts/pretrain.py --config configs/llava/mini/clip.yaml --limit 1000 --out runs/try

Precompute the towers' grids with scripts/cache_towers.py and give --cache: a step then runs no tower.
"""

from llava_ext.command import main
from llava_ext.options import PretrainConfig


def run(config: PretrainConfig) -> None:
    """Train stage 1."""
    from llava_ext.job import run as train

    train(config)


if __name__ == "__main__":
    main(PretrainConfig, run, __doc__ or "", "pretrain")

"""Stage 2 of LLaVA training: projectors and language model learn, or projectors and a LoRA adapter.

The paper's: LLaVA-Instruct-80K, effective batch 128, learning rate 2e-5, cosine, 1 epoch, ZeRO-3.

    deepspeed scripts/finetune.py --config configs/llava/clip-sd-t25.yaml --pretrained runs/llava/pretrain
    deepspeed scripts/finetune.py --config configs/llava/clip.yaml --pretrained DIR --lora.rank 64
    python scripts/finetune.py --config configs/llava/mini/clip.yaml --pretrained DIR

The finished model is `final/` in the run directory: python scripts/chat.py --model DIR/final --image FILE
"""

from llava_ext.command import main
from llava_ext.options import FinetuneConfig


def run(config: FinetuneConfig) -> None:
    """Train stage 2."""
    from llava_ext.job import run as train

    train(config)


if __name__ == "__main__":
    main(FinetuneConfig, run, __doc__ or "", "finetune")

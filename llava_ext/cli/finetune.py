"""Stage 2 of LLaVA training: projectors and language model learn, or projectors and a LoRA adapter.

The paper's: LLaVA-Instruct-80K, effective batch 128, learning rate 2e-5, cosine, 1 epoch, ZeRO-3.

    revelio llava finetune --config configs/llava/mini/clip.yaml --pretrained DIR
    deepspeed scripts/finetune.py --config configs/llava/clip-sd-t25.yaml --pretrained runs/llava/pretrain
    deepspeed scripts/finetune.py --config configs/llava/clip.yaml --pretrained DIR --lora.rank 64

The finished model is `final/` in the run directory: revelio llava chat --model DIR/final --image FILE
"""

from llava_ext.config import FinetuneConfig as Config

SECTION = "finetune"
CARRIES: tuple[str, ...] = ()  # a finished model holds what it was made of


def run(config: Config) -> None:
    """Train stage 2."""
    from llava_ext.run import run as train

    train(config)


def following(config: Config, given: list[str], section: str) -> list[object]:
    """The next command."""
    return ["llava", "chat", "--model", config.out / "final", "--image", "FILE"]

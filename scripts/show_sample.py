"""Print one training sample as the model gets it, with the learnt tokens marked.

python scripts/show_sample.py --config configs/llava/mini/clip.yaml --index 3
python scripts/show_sample.py --config configs/llava/clip.yaml --section finetune --model.template llama_2
"""

from llava_ext.command import main
from llava_ext.options import ShowConfig


def run(config: ShowConfig) -> None:
    """Read the record, encode it, print it."""
    from llava_ext.show import show

    print(show(config))


if __name__ == "__main__":
    main(ShowConfig, run, __doc__ or "")

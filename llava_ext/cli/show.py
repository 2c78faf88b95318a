"""Print one training sample as the model gets it, with the learnt tokens marked.

    revelio llava show --config configs/llava/mini/clip.yaml --index 3
    revelio llava show --config configs/llava/clip.yaml --section finetune --model.template llama_2

It needs the language model's tokenizer, not its weights.
"""

from llava_ext.config import ShowConfig as Config

SECTION = ""
CARRIES = ("--data.", "--model.", "--limit", "--bad-records", "--cache")


def run(config: Config) -> None:
    """Read the record, encode it, print it."""
    from llava_ext.show import show

    print(show(config))


def following(config: Config, given: list[str], section: str) -> list[object]:
    """The next command, on the same records."""
    return ["llava", section, *given]

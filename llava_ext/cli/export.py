"""Write a finished model in a form that others read, or with its adapter folded into the language model.

    revelio llava export --model runs/llava/finetune/final --form merged --out runs/merged
    revelio llava export --model runs/llava/pretrain/final --form llava --out runs/llava-sd

`llava` is mm_projector.bin and config.json for LLaVA's own code with `llava_ext.llava_plugin`; `transformers`
has the names of transformers' LLaVA. `revelio llava finetune --pretrained FOLDER` reads both back.
"""

from llava_ext.config import ExportConfig as Config
from revelio.following import following


def run(config: Config) -> None:
    """Load, convert, write, and name the files."""
    from llava_ext.export import export_model

    for name in export_model(config.model, config.out, config.form):
        print(config.out / name)
    if config.form == "merged":
        print(following("llava", "chat", "--model", config.out, "--image", "FILE"))

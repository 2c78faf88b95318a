"""Prompts -> activation stores of a text encoder's tokens: a row a token position.

The k-SAE trainer reads them as any other store. An interrupted run goes on with --resume; several processes
share the prompts.

    revelio extract-text --prompts-file prompts.txt --layers text_encoder.block1 --out runs/tokens
    revelio extract-text --config configs/steering/sd14.yaml --prompts-file i2p.csv
    torchrun --nproc-per-node 4 -m revelio extract-text --config configs/steering/flux.yaml --prompts-file P
"""

from revelio.steering.config import ExtractTextConfig as Config
from revelio.wording import plural


def run(config: Config) -> None:
    """Extract, and name what was written."""
    from revelio.cli.bar import Bar
    from revelio.following import beside, following
    from revelio.pipelines.extract_text import extract_text

    with Bar("tokens") as bar:
        made = extract_text(config, bar)
    for store in made:
        print(f"{store.path}  {plural(len(store), 'row')} of {store.row_shape[0]}")
    out = beside(config.out, "ksae")
    print(following("train-ksae", "--store", made[0].path, "--expansion", 4, "--out", out))

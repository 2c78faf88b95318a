"""A gallery in the browser, where a picture can be dropped in: which latents fire on it, and where.

    revelio serve runs/ksae/gallery
    revelio serve runs/gallery --ksae runs/ksae --backbone.name sd-1.5

Listens at this machine's own address only, unless another is given. Nothing that is dropped in is kept.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from revelio.analysis.config import ServeConfig
from revelio.bounds import Folder


@dataclass(frozen=True, kw_only=True)
class Config(ServeConfig):
    """Which gallery is shown, and where."""

    gallery: Annotated[Folder, tyro.conf.Positional]
    """The folder that `revelio gallery` wrote."""


def run(config: Config) -> None:
    """Serve until Ctrl-C."""
    from revelio.cli.bar import Bar
    from revelio.pipelines.serve import open_server

    with Bar("serve") as bar:
        server = open_server(config, bar)
    host, port = server.server_address[:2]
    print(f"http://{host}:{port}/ (Ctrl-C ends it)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("\nended")
    finally:
        server.server_close()

"""docs/tutorial.ipynb runs, shows what it says, and needs nothing but the public names."""

import base64
import json
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

import revelio
from tools.tutorial import NOTEBOOK, execute

LIMIT = 300_000


@pytest.fixture(scope="module")
def notebook() -> dict:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def texts(cell: dict) -> str:
    return "".join(
        "".join(one["text"]) for one in cell["outputs"] if one["output_type"] == "stream"
    )


def pictures(cell: dict) -> list[Image.Image]:
    shown = [one["data"].get("image/png") for one in cell["outputs"] if "data" in one]
    return [Image.open(BytesIO(base64.b64decode(found))) for found in shown if found]


def test_the_notebook_runs_and_shows_what_its_saved_outputs_show(notebook, tmp_path: Path) -> None:
    found = execute(notebook, tmp_path)
    for cell, saved in zip(found["cells"], notebook["cells"], strict=True):
        if cell["cell_type"] == "code":
            # Numbers may differ with the machine; what is said and shown may not.
            wordings = [re.sub(r"[-+]?\d[\d.,]*", "#", texts(one)) for one in (cell, saved)]
            sizes = [[picture.size for picture in pictures(one)] for one in (cell, saved)]
            if "latents" not in wordings[0] and "share:" not in wordings[0]:
                assert wordings[0] == wordings[1]
            assert sizes[0] == sizes[1]
    said = "".join(texts(cell) for cell in found["cells"] if cell["cell_type"] == "code")
    assert all(name in said for name in ("random directions", "data rows", "channels", "principal"))
    assert "held-out images: FVU" in said and "majority share: " in said
    assert sum(len(pictures(cell)) for cell in found["cells"] if cell["cell_type"] == "code") == 3
    assert {path.name for path in tmp_path.iterdir()} == {"tutorial"}


def test_the_notebook_is_small_whole_and_uses_public_names_only(notebook) -> None:
    assert NOTEBOOK.stat().st_size < LIMIT
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    source = "\n".join("".join(cell["source"]) for cell in cells)
    used = set(re.findall(r"revelio\.(\w+)", source))
    assert used <= set(revelio.__all__) and len(used) > 8
    assert "from revelio" not in source


def test_public_names_are_there_and_cost_nothing_until_used() -> None:
    program = (
        "import sys, revelio\n"
        "assert 'torch' not in sys.modules and 'PIL' not in sys.modules\n"
        "assert set(revelio.__all__) <= set(dir(revelio))\n"
        "revelio.TrainSAEConfig, revelio.DataConfig, revelio.PurityConfig\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert all(getattr(revelio, name) is not None for name in revelio.__all__)

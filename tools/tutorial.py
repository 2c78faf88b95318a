"""docs/tutorial.ipynb executed: its code cells one after the other, their outputs put in place.

    python -m tools.tutorial            executes the notebook and writes it, outputs included

A cell's output is what it prints, then the value of its last line: a picture as PNG, anything else as its
repr. No Jupyter is needed; in one, the notebook runs just the same.
"""

import ast
import base64
import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from revelio.files import write_whole

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"


def execute(notebook: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The notebook with the outputs of its code cells, which run in ``folder`` and share one namespace.

    Raises:
        Exception: whatever a cell raises.
    """
    before, names = Path.cwd(), {"__name__": "__main__"}
    os.chdir(folder)
    try:
        cells, count = [], 0
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                count += 1
                outputs = _run("".join(cell["source"]), names, count)
                cell = cell | {"outputs": outputs, "execution_count": count}
            cells.append(cell)
    finally:
        os.chdir(before)
    return notebook | {"cells": cells}


def _run(source: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """A cell's outputs in the form of a notebook."""
    tree, value, printed = ast.parse(source), None, io.StringIO()
    last = tree.body[-1] if tree.body else None
    with redirect_stdout(printed):
        if not isinstance(last, ast.Expr):
            exec(compile(tree, f"<cell {count}>", "exec"), names)
        else:
            tree.body.pop()
            exec(compile(tree, f"<cell {count}>", "exec"), names)
            value = eval(compile(ast.Expression(last.value), f"<cell {count}>", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        text = printed.getvalue().splitlines(keepends=True)
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    if value is not None:
        shown = {"data": _shown(value), "metadata": {}, "execution_count": count}
        outputs.append({"output_type": "execute_result"} | shown)
    return outputs


def _shown(value: Any) -> dict[str, Any]:
    if not isinstance(value, Image.Image):
        return {"text/plain": repr(value).splitlines(keepends=True)}
    file = io.BytesIO()
    value.save(file, "PNG", optimize=True)
    return {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["<a picture>"]}


def main() -> None:
    """Execute the notebook and write it in place."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    with TemporaryDirectory() as folder:
        found = execute(notebook, Path(folder))
    write_whole(NOTEBOOK, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

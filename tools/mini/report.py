"""`docs/mini_models.json`: every section's figures with what made them, written one at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from revelio.run_dir import write_json

Figures = dict[str, Any]
Section = Callable[["Inputs"], Figures]


class Inputs:
    """Where models and data are, and with which seed; given to every section."""

    def __init__(
        self,
        models: Path,
        docs: Path,
        runs: Path,
        fashion_mnist: Path | None,
        caltech101: Path | None,
        seed: int,
    ) -> None:
        self.models = models
        self.docs = docs
        self.runs = runs
        self.fashion_mnist = fashion_mnist
        self.caltech101 = caltech101
        self.seed = seed

    def fashion(self) -> Path:
        """The folder of Fashion-MNIST.

        Raises:
            ValueError: It was not given.
        """
        if self.fashion_mnist is None:
            raise ValueError("this section needs Fashion-MNIST: use --fashion-mnist")
        return self.fashion_mnist

    def caltech(self) -> Path:
        """The folder of Caltech-101.

        Raises:
            ValueError: It was not given.
        """
        if self.caltech101 is None:
            raise ValueError("this section needs Caltech-101: use --caltech101")
        return self.caltech101


def read_report(path: Path) -> dict[str, Figures]:
    """All sections written so far."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_section(path: Path, name: str, section: Section, inputs: Inputs) -> Figures:
    """Measure one section and put it in its place in the report; the others stay as they are."""
    wall, processor = time.perf_counter(), time.process_time()
    figures = section(inputs)
    figures |= {
        "seed": inputs.seed,
        "seconds": round(time.perf_counter() - wall, 1),
        # What it takes on a machine that does nothing else, with one thread.
        "processor_seconds": round(time.process_time() - processor, 1),
        "command": f"python -m tools.evaluate_mini --only {name}",
    }
    report = read_report(path) | {name: figures}
    write_json(path, report)
    return figures

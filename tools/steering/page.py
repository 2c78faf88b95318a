"""docs/steering.md."""

from pathlib import Path
from typing import Any

from tools.steering.setting import Setting


def write_page(found: dict[str, Any], setting: Setting, docs: Path) -> None:
    """Later."""
    import json

    (setting.work / "report.json").write_text(json.dumps(found, indent=1))

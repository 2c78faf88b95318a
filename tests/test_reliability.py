"""The reliability campaign in its quick form: it finds nothing here, and it finds what is put there."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def test_the_quick_campaign_finds_nothing(tmp_path: Path) -> None:
    import reliability  # type: ignore[import-not-found]

    status = reliability.main(["--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "reliability.json").read_text())
    assert status == 0, found
    assert sum(kind["inputs"] for kind in found["inputs"]["found"].values()) >= 15
    assert sum(kind["refused"] for kind in found["inputs"]["found"].values()) >= 5
    assert found["crash_points"]["found"]["top-images"]["stops"] >= 1
    assert "hostile inputs" in (tmp_path / "reliability.md").read_text()


def test_the_document_shows_the_last_numbers() -> None:
    import reliability  # type: ignore[import-not-found]

    found = json.loads((ROOT / "docs" / "reliability.json").read_text())
    assert (ROOT / "docs" / "reliability.md").read_text() == reliability.render(found)
    assert sum(kind["inputs"] for kind in found["inputs"]["found"].values()) >= 1000
    faults: Counter[str] = Counter()
    for kind in found["inputs"]["found"].values():
        faults.update(kind["faults"])
    assert not faults


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("open(outside / 'precious.txt').close()", "touched"),
        ("open(folder.parent / 'elsewhere', 'w').close()", "touched"),
        ("(folder.parent / 'gone').mkdir()", "touched"),
        ("os.system('true')", "ran"),
        ("__import__('socket').getaddrinfo('localhost', 1)", "asked"),
        ("1 / 0", "traceback"),
        ("__import__('time').sleep(60)", "hang"),
        ("os.kill(os.getpid(), 15)", "signal"),
        ("bytearray(200 << 20).find(b'x')", "memory"),
        ("sys.exit(3)", "status"),
    ],
)
def test_the_sandbox_sees(tmp_path: Path, code: str, fault: str) -> None:
    from campaign.sandbox import TRACEBACK, Limits, run  # type: ignore[import-not-found]

    folder, outside = tmp_path / "case", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "precious.txt").write_text("x")
    names = {"folder": folder, "outside": outside, "os": __import__("os"), "sys": sys}
    limits = Limits(seconds=0.2 if fault == "hang" else 30.0)
    found = run(lambda: exec(code, names), folder, outside=outside, limits=limits)
    seen = {
        "touched": bool(found.touched),
        "ran": bool(found.ran),
        "asked": bool(found.asked),
        "traceback": found.status == TRACEBACK,
        "hang": found.signal == 9,
        "signal": found.signal == 15,
        "memory": found.memory > 100 << 20,
        "status": found.status == 3,
    }
    assert seen.pop(fault)
    assert not any(seen.values()), found

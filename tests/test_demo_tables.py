"""README's measured part is what the JSON says."""

from pathlib import Path

from revelio.demo.tables import demo_tables, measured

ROOT = Path(__file__).parent.parent


def report() -> dict:
    cell = {
        "layer": "up_ft1",
        "timestep": 25,
        "majority_share": 0.6789,
        "majority_share_chance": 0.25,
        "interval": {"majority_share": [0.61, 0.72]},
    }
    row = {"layer": "up_ft1", "timestep": 25, "top1": 81.25, "interval": [80.0, 82.5]}
    row |= {"random_weights_top1": 70.0, "random_weights_interval": [69.0, 71.0]}
    row |= {"pixels_top1": 60.0, "pixels_interval": [59.0, 61.0]}
    about = {"model": "m", "dataset": "d", "images": 2000, "test_images": 500, "mode": "fixed"}
    return about | {"purity": [cell], "diffc": [row], "seconds": {"a": 60.0, "b": 30.0}}


def test_tables_hold_the_numbers_of_the_report() -> None:
    text = demo_tables(report())
    assert "| up_ft1 | 0.679 (0.610 to 0.720) |" in text
    assert (
        "| up_ft1, 25 | 81.2 (80.0 to 82.5) | 70.0 (69.0 to 71.0) | 60.0 (59.0 to 61.0) |" in text
    )
    assert "1.5 minutes" in text and "chance 0.250" in text


def test_readme_is_up_to_date() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    part = readme.split("<!-- measured:", 1)[1].split("\n", 1)[1].split("<!-- /measured -->")[0]
    assert part == measured(ROOT / "docs")

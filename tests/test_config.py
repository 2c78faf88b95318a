from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from revelio import config
from revelio.bounds import derived, shared
from revelio.config import load_config, structure, to_plain, to_yaml


@dataclass(frozen=True)
class Inner:
    source: str = "here"
    limit: int | None = None
    root: Path | None = None


@dataclass(frozen=True)
class Outer:
    out: Path
    rate: float = 0.5
    layers: tuple[str, ...] = ("a", "b")
    inner: Inner = field(default_factory=Inner)
    keep: bool = False


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_reads_nested_values_and_keeps_defaults(tmp_path: Path) -> None:
    config = load_config(
        Outer, write(tmp_path, "out: x\nrate: 1e-4\nlayers: [c]\ninner: {limit: 3, root: r}\n")
    )
    assert config == Outer(Path("x"), 1e-4, ("c",), Inner(limit=3, root=Path("r")))


def test_overrides_win(tmp_path: Path) -> None:
    path = write(tmp_path, "out: x\nrate: 2\n")
    assert load_config(Outer, path, {"rate": 3.0}).rate == 3.0


@given(
    rate=st.floats(allow_nan=False, allow_infinity=False),
    layers=st.lists(st.text("abc_é:#-0", min_size=0, max_size=5)).map(tuple),
    limit=st.none() | st.integers(-(10**9), 10**9),
    source=st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=8),
    keep=st.booleans(),
)
def test_yaml_round_trip(rate, layers, limit, source, keep) -> None:
    config = Outer(Path("a/b"), rate, layers, Inner(source, limit), keep)
    assert structure(Outer, yaml.safe_load(to_yaml(config))) == config
    assert to_plain(config)["inner"]["limit"] == limit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out: x\nrat: 1\n", r"unknown key `rat`: did you mean `rate`\? allowed are out, rate"),
        ("out: x\ninner: {sorce: y}\n", r"unknown key `inner.sorce`: did you mean `source`"),
        ("rate: 1\n", "`out` is required"),
        ("out: x\nrate: fast\n", "`rate` is 'fast', which is not float"),
        ("out: x\nrate: true\n", "`rate` is True, which is not float"),
        ("out: x\nkeep: 1\n", "`keep` is 1, which is not bool"),
        ("out: x\ninner: {limit: 1.5}\n", "`inner.limit` is 1.5, which is not int"),
        ("out: x\ninner: 3\n", "`inner` must hold"),
        ("out: x\nlayers: abc\n", "`layers` is 'abc', which is not tuple"),
        ("- 1\n", "not a list"),
        ("a: [\n", "is not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_config(Outer, write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_config_is_derived_from_another_by_the_settings_that_both_declare() -> None:
    @dataclass(frozen=True)
    class Other:
        rate: float
        inner: Inner
        limit: int = 3
        keep: bool = True

    given = Outer(Path("x"), rate=0.25, inner=Inner("there"))
    assert shared(given, Other) == {"rate": 0.25, "inner": Inner("there"), "keep": False}
    assert derived(given, Other, keep=True) == Other(0.25, Inner("there"), 3, True)
    assert shared(given, Outer) == vars(given)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config file at .*nope\.yaml"):
        load_config(Outer, tmp_path / "nope.yaml")


def test_a_class_s_types_are_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Fresh:
        size: int = 1

    asked = []
    evaluate = config.get_type_hints
    monkeypatch.setattr(config, "get_type_hints", lambda cls: asked.append(cls) or evaluate(cls))
    assert [structure(Fresh, {"size": number}).size for number in (2, 3)] == [2, 3]
    assert asked == [Fresh]
    with pytest.raises(ValueError, match="`size` is True, which is not int"):
        structure(Fresh, {"size": True})

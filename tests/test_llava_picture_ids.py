"""Names of pictures by what they hold: read once, and found again whatever a name holds."""

import os
from pathlib import Path

import pytest
from backbones_helpers import picture

from llava_ext.images import STAMPS, name_of, picture_ids, plain_ids


def test_pictures_are_read_once(tmp_path, monkeypatch) -> None:
    names = [f"{number}.png" for number in range(3)]
    for number, name in enumerate(names):
        picture(number).save(tmp_path / name)
    read: list[str] = []

    def digest(path: Path) -> str:
        read.append(path.name)
        return "0" * 32

    monkeypatch.setattr("llava_ext.images.digest_of", digest)
    first = picture_ids(tmp_path, names, tmp_path, keep=True)
    assert sorted(read) == names and picture_ids(tmp_path, names, tmp_path) == first
    assert [identity.rpartition("|")[0] for identity in first] == plain_ids(tmp_path, names)
    assert len(read) == 3
    os.utime(tmp_path / "1.png", (1, 1))
    assert picture_ids(tmp_path, names, tmp_path, keep=True) == first and read[3:] == ["1.png"]
    assert picture_ids(tmp_path, names, tmp_path) == first and len(read) == 4
    for broken in ("", "[]", '{"pictures": {"0.png": [1, 2]}}', '{"pictures": 3}'):
        (tmp_path / STAMPS).write_text(broken)
        del read[:]
        assert picture_ids(tmp_path, names, tmp_path) == first and sorted(read) == names


@pytest.mark.parametrize("name", ["a|b.png", "a|12.png", "|.png", "a|7|0123.png", "b.png"])
def test_a_picture_is_found_by_its_name_whatever_that_holds(tmp_path, name) -> None:
    picture(1).save(tmp_path / name)
    for identity in (*picture_ids(tmp_path, [name], tmp_path), *plain_ids(tmp_path, [name])):
        assert name_of(identity) == name
    assert name_of(f"{name}|12|unreadable") == name

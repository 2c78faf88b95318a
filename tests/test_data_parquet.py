"""Parquet files whose rows take far more memory than the file: refused, in memory that the file bounds."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import noise_picture, png

from revelio.data.dataset import ImageError
from revelio.data.open import open_dataset
from revelio.data.sources import parquet

MIB = 1 << 20
BLOB = np.random.default_rng(0).bytes(MIB)


def repeated(path: Path, rows: int, kind: str) -> Path:
    """One blob of a MiB, ``rows`` times, as struct or bytes; stored once."""
    values = [bytes(MIB) if kind == "zstd" else BLOB] * rows
    pictures = [{"bytes": value, "path": None} for value in values] if kind == "struct" else values
    table = pyarrow.table({"image": pictures, "label": list(range(rows))})
    encodings = {"image": "DELTA_BYTE_ARRAY"} if kind == "delta" else None
    names = ["image.bytes"] if kind == "struct" else ["image"]
    pyarrow.parquet.write_table(
        table,
        path,
        compression="zstd" if kind == "zstd" else None,
        use_dictionary=names if kind in ("struct", "bytes") else False,
        column_encoding=encodings,
        dictionary_pagesize_limit=64 * MIB,
        write_batch_size=8,
        data_page_size=1 << 30,
    )
    return path


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", ["struct", "bytes", "delta", "zstd"])
def test_rows_beyond_the_file_are_refused(tmp_path, monkeypatch, kind, large):
    path = repeated(tmp_path / "a.parquet", 200, kind)
    assert path.stat().st_size < 3 * MIB
    monkeypatch.setattr(parquet, "SLACK", MIB)
    if large:  # which `datasets` would copy to its cache
        monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 0)
    with pytest.raises(ValueError, match=r"a\.parquet can't be read as parquet: .*times the file"):
        open_dataset(str(path))


@pytest.mark.parametrize("typed", [False, True])
def test_the_memory_taken_is_bounded(tmp_path, typed):
    """2 GiB of rows in a file of a MiB; Arrow's own count of what it took, in a process of its own."""
    path = repeated(tmp_path / "a.parquet", 256, "bytes")
    table = pyarrow.parquet.read_table(path, read_dictionary=["image"])
    many = pyarrow.concat_tables([table] * 8).unify_dictionaries()
    pyarrow.parquet.write_table(
        many,
        path,
        compression=None,
        use_dictionary=["image"],
        dictionary_pagesize_limit=64 * MIB,
        store_schema=typed,
    )
    assert path.stat().st_size < 3 * MIB
    program = (
        "import sys, pyarrow\n"
        "from revelio.data.open import open_dataset\n"
        "try: open_dataset(sys.argv[1])\n"
        "except ValueError as error: print(error)\n"
        "print(pyarrow.default_memory_pool().max_memory())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=120
    )
    said, taken = done.stdout.strip().splitlines()
    assert "times the file" in said, done.stderr
    assert int(taken) < 512 * MIB


@pytest.mark.parametrize("wrap", ["struct", "list"])
def test_a_dictionary_inside_a_column_is_counted_too(tmp_path, monkeypatch, wrap):
    """Arrow keeps what its own schema calls a dictionary as one, also within a struct or a list."""
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 200, "int32"), [BLOB])
    if wrap == "struct":
        column = pyarrow.StructArray.from_arrays([column], ["bytes"])
    else:
        column = pyarrow.ListArray.from_arrays(list(range(201)), column)
    [batch] = pyarrow.table({"image": column}).to_batches()
    assert batch.nbytes < 3 * MIB
    assert parquet._decoded_bytes(batch) > 200 * MIB


def test_pictures_named_by_a_row_are_looked_for_beside_their_file(tmp_path, monkeypatch):
    for place, name in enumerate(("images/a.png", "b.png")):
        (tmp_path / "set/data" / name).parent.mkdir(parents=True, exist_ok=True)
        noise_picture(6, 5, place).save(tmp_path / "set/data" / name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    names = ["images/a.png", "b.png", "../../secret.png", str(tmp_path / "secret.png")]
    noise_picture(6, 5, 9).save(tmp_path / "secret.png")
    for column in (names, [{"bytes": None, "path": name} for name in names]):
        path = tmp_path / "set/data/train.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"image": column, "label": [0, 1, 0, 1]}), path)
        dataset = open_dataset(path)
        for index in (0, 1):
            assert dataset.read(index).tobytes() == noise_picture(6, 5, index).tobytes()
        for index in (2, 3):
            with pytest.raises(ImageError, match="not in the data set's own folder"):
                dataset.read(index)


def test_pictures_named_with_backslashes_are_found(tmp_path):
    names = ["below\\a.png", "below\\b\\c.png", "odd\\name.png", "..\\secret.png"]
    files = ["set/below/a.png", "set/below/b/c.png", "set/odd\\name.png", "secret.png"]
    for place, name in enumerate(files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise_picture(6, 5, place).save(tmp_path / name)
    for column in (names, [{"bytes": None, "path": name} for name in names]):
        path = tmp_path / "set/train.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"image": column, "label": [0, 1, 0, 1]}), path)
        dataset = open_dataset(path)
        for index in range(3):
            assert dataset.read(index).tobytes() == noise_picture(6, 5, index).tobytes()
        with pytest.raises(ImageError):
            dataset.read(3)


def test_honest_files_are_read_whole(tmp_path):
    pictures = [png(noise_picture(20, 20, number)) for number in range(50)]
    table = pyarrow.table({"image": pictures, "label": [n % 3 for n in range(50)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    dataset = open_dataset(str(tmp_path / "a.parquet"))
    assert len(dataset) == 50 and list(dataset.labels) == [n % 3 for n in range(50)]
    for index in (0, 7, 49):
        assert dataset.read(index).tobytes() == noise_picture(20, 20, index).tobytes()
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "b.parquet")
    assert parquet._read_parquet([tmp_path / "b.parquet"]).num_rows == 0

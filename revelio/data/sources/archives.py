"""The folder layouts of data sets' own archives, read into a :class:`revelio.data.sources.listing.Listing`.

Each reader gives None for a folder that is not laid out its way, and raises ValueError for one that is but
lacks pictures. Class ids and splits are those that the archives' own lists state.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from revelio.data.sources.folder import read_lists
from revelio.data.sources.listing import Listing
from revelio.data.spec import DatasetSpec
from revelio.trust import printable, read_text
from revelio.wording import plural

_Line = Callable[[str], tuple[str, int]]


def oxford_pet(root: Path, _: DatasetSpec) -> Listing | None:
    """``images/Abyssinian_100.jpg`` + ``annotations/trainval.txt``: ``Abyssinian_100 1 1 1``, ids from 1."""
    lists = {"train": root / "annotations/trainval.txt", "test": root / "annotations/test.txt"}
    if not all(file.is_file() for file in lists.values()):
        return None
    names: dict[int, str] = {}

    def line(text: str) -> tuple[str, int]:
        stem, number = text.split()[:2]
        breed = stem.rpartition("_")[0]
        if names.setdefault(int(number) - 1, breed) != breed:
            raise ValueError(f"class {number} has two names")
        return f"{stem}.jpg", int(number) - 1

    splits = _read(root / "images", lists, line)
    if set(names) != set(range(len(names))):
        raise ValueError(f"{lists['train']} and {lists['test'].name} skip a class number")
    return Listing(root / "images", tuple(names[label] for label in range(len(names))), splits)


def fgvc_aircraft(root: Path, _: DatasetSpec) -> Listing | None:
    """``data/images/1025794.jpg`` + ``data/images_variant_train.txt``: ``1025794 707-320``.

    Class ids are line numbers of ``variants.txt``.
    """
    data = root / "data" if (root / "data").is_dir() else root
    known = {"train": "train", "validation": "val", "test": "test"}
    lists = {split: data / f"images_variant_{word}.txt" for split, word in known.items()}
    lists = {split: file for split, file in lists.items() if file.is_file()}
    if not lists or not (data / "variants.txt").is_file():
        return None
    classes = tuple(read_text(data / "variants.txt").split("\n"))
    classes = tuple(name.strip() for name in classes if name.strip())
    ids = {name: index for index, name in enumerate(classes)}

    def line(text: str) -> tuple[str, int]:
        number, _, variant = text.partition(" ")
        return f"{number}.jpg", ids[variant.strip()]

    return Listing(data / "images", classes, _read(data / "images", lists, line))


def dtd(root: Path, _: DatasetSpec) -> Listing | None:
    """``images/banded/banded_0002.jpg`` + ``labels/train1.txt``: the first of its ten partitions."""
    lists = {"train": "train1", "validation": "val1", "test": "test1"}
    files = {split: root / f"labels/{stem}.txt" for split, stem in lists.items()}
    if not all(file.is_file() for file in files.values()):
        return None
    return read_lists(root / "images", {split: [file] for split, file in files.items()})


def flowers(root: Path, spec: DatasetSpec) -> Listing | None:
    """``jpg/image_00001.jpg`` + ``imagelabels.mat`` (class numbers from 1) + ``setid.mat`` (the splits)."""
    if not (root / "imagelabels.mat").is_file() or not (root / "setid.mat").is_file():
        return None
    from scipy.io import loadmat

    keys = {"train": "trnid", "validation": "valid", "test": "tstid"}
    try:
        labels = [int(n) - 1 for n in loadmat(str(root / "imagelabels.mat"))["labels"][0]]
        sets = loadmat(str(root / "setid.mat"))
        numbers = {split: [int(n) for n in sets[key][0]] for split, key in keys.items()}
    except Exception as error:  # scipy raises nearly anything on a broken file.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{printable(root)}: imagelabels.mat or setid.mat is not as expected: {printable(reason)}"
        ) from error
    used = [n for part in numbers.values() for n in part]
    if not used or min(used) < 1 or max(used) > len(labels):
        raise ValueError(f"{root / 'setid.mat'} names images that imagelabels.mat has no label for")
    if min(labels) < 0 or max(labels) >= len(spec.classes):
        raise ValueError(f"{root / 'imagelabels.mat'} has classes beyond 1 to {len(spec.classes)}")
    splits = {
        split: [(f"image_{n:05d}.jpg", labels[n - 1]) for n in part]
        for split, part in numbers.items()
    }
    _check_there(root / "jpg", splits, root / "setid.mat")
    return Listing(root / "jpg", spec.classes, splits)


def _read(
    images: Path, lists: Mapping[str, Path], line: _Line
) -> dict[str, list[tuple[str, int | None]]]:
    splits: dict[str, list[tuple[str, int | None]]] = {}
    for split, file in lists.items():
        splits[split] = []
        for number, text in enumerate(read_text(file).split("\n"), 1):
            if not text.strip() or text.startswith("#"):
                continue
            try:
                splits[split].append(line(text.strip()))
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"{file} line {number} is not as expected: {printable(text[:200])!r}"
                ) from error
        _check_there(images, {split: splits[split]}, file)
    return splits


def _check_there(
    images: Path, splits: Mapping[str, Sequence[tuple[str, int | None]]], where: Path
) -> None:
    there = {entry.name for entry in images.iterdir()} if images.is_dir() else set()
    missing = [name for entries in splits.values() for name, _ in entries if name not in there]
    if missing:
        raise ValueError(
            f"{where} lists {plural(len(missing), 'picture that is', 'pictures that are')} not in "
            f"{printable(images)}, the first is {printable(missing[0])}: complete the folder"
        )

"""A store in the making: begun, filled shard by shard in any order, then closed by its manifest.

begin    unfinished.json holds the settings; a resumed run must have the same; one process has the lock
fill     shard-00000.safetensors ... each whole or absent
finish   manifest.json, then unfinished.json goes
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from revelio.activations.format import check_names, read_header, shard_name
from revelio.activations.manifest import (
    LABEL_LIMIT,
    MADE_BY,
    MANIFEST,
    UNFINISHED,
    ShardEntry,
    check_fields,
    read_manifest,
    write_manifest,
)
from revelio.files import sweep
from revelio.lock import NAME as LOCK
from revelio.lock import Lock, check_free, take_lock
from revelio.run_dir import write_json
from revelio.trust import file_in, read_object, regular_file

# Hashes of the pictures' stored bytes: of all, and (while the store is unfinished) of each shard.
CONTENTS = "contents_sha256"
SHARD_CONTENTS = "shard_contents"
# The temporary names of what a store writes; other hidden files are somebody else's.
_PARTIAL = re.compile(
    r"\.(manifest\.json|unfinished\.json|shard-\d{5,}\.safetensors)\.\d+(-[0-9a-f]{8,24})?\.partial"
)


@dataclass(frozen=True)
class StoreWriter:
    """A store that an extraction is to make.

    Attributes:
        path: its folder.
        settings: manifest fields, plain values: a resumed run must agree with them.
    """

    path: Path
    settings: Mapping[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the manifest is there, and every shard has the size it names."""
        if not (self.path / MANIFEST).is_file():
            return False
        return not any(_is_cut(self.path, shard) for shard in read_manifest(self.path).shards)

    @property
    def started(self) -> bool:
        """Whether anything but settings is there."""
        return (self.path / MANIFEST).exists() or any(self.path.glob(shard_name(0)[:6] + "*"))

    def check(self, *, resume: bool) -> None:
        """See whether this run may fill the store; writes nothing.

        Args:
            resume: whether shards that are there already may be kept.

        Raises:
            ValueError: the store is there and ``resume`` is off, it has other settings, or another process
                is filling it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: choose a folder")
        if not self.finished:
            check_free(self.path)
        if not self.started:
            return
        if not resume:
            raise ValueError(
                f"{self.path} already holds a store: go on with resume, or choose another folder"
            )
        free = {"made_with", CONTENTS, SHARD_CONTENTS}
        if (self.path / MANIFEST).exists():
            # The rows of a finished store are what they are, however they were cut into shards.
            free |= {"shard_images"}
        elif not (self.path / UNFINISHED).exists():
            raise ValueError(f"{self.path} holds shards of unknown making: choose another folder")
        was = self.written_settings()
        # A store of a version that did not record the crop is taken at its image size.
        free |= {"crop"} - set(was)
        if not (self.path / MANIFEST).exists() and self._smaller_batches(was):
            free |= {"batch_size"}
        check_same(self.path, was, self.settings, free=free)
        if self._other_contents(was):
            raise ValueError(
                f"{self.path} was made of other pictures than those that now have the same names: "
                f"put the old ones back or choose another folder"
            )

    def _smaller_batches(self, was: Mapping[str, Any]) -> bool:
        """Whether batches are now an even part of what they were, as after running out of memory.

        The rows differ at most as much as a device's rounding depends on the size of a batch.
        """
        before, now = was.get("batch_size"), self.settings.get("batch_size")
        return isinstance(before, int) and isinstance(now, int) and now > 0 and before % now == 0

    def _other_contents(self, was: Mapping[str, Any]) -> bool:
        """Whether rows that are there were made of pictures that have changed since.

        A store of a version that did not record contents is taken at its names.
        """
        if CONTENTS not in was or CONTENTS not in self.settings:
            return False
        if was[CONTENTS] == self.settings[CONTENTS]:
            return False
        before, now = was.get(SHARD_CONTENTS), self.settings.get(SHARD_CONTENTS)
        if not (isinstance(before, list) and now and len(before) == len(now)):
            return True
        # A picture that was mended while its shard was not yet made changes no row.
        return any(
            old != new and (self.path / shard_name(number)).exists()
            for number, (old, new) in enumerate(zip(before, now, strict=True))
        )

    def begin(self) -> Lock | None:
        """Take the store's lock, write the settings down, clear away what a killed run left half-written.

        Returns:
            The lock, to be held until the store is finished; None of a store that is finished, which needs
            none.

        Raises:
            ValueError: another process is filling the store; the message names it.
            OSError: the folder can't be written.
        """
        sweep(self.path, dead=True)
        if self.finished:
            with suppress(
                ValueError, OSError
            ):  # what a process that was killed at the very end left
                (self.path / UNFINISHED).unlink(missing_ok=True)
                if (self.path / LOCK).exists():
                    take_lock(self.path).release()
            return None
        self.path.mkdir(parents=True, exist_ok=True)
        lock = take_lock(self.path)
        for partial in self.path.iterdir():
            if _PARTIAL.fullmatch(partial.name) and not partial.is_dir():
                partial.unlink(missing_ok=True)
        if (self.path / MANIFEST).exists():
            self._reopen()
        elif not (self.path / UNFINISHED).exists() or not self.started:
            write_json(self.path / UNFINISHED, dict(self.settings))
        else:
            was = self.written_settings()
            now = {key: self.settings.get(key) for key in (CONTENTS, SHARD_CONTENTS) if key in was}
            if any(was[key] != value for key, value in now.items()):
                write_json(self.path / UNFINISHED, was | now)
        return lock

    def _reopen(self) -> None:
        """Turn a finished store that lost part of a shard into an unfinished one."""
        manifest = read_manifest(self.path)
        cut = {**self.settings, "shard_images": manifest.values.get("shard_images")}
        if cut["shard_images"] != self.settings.get("shard_images"):
            raise ValueError(
                f"{self.path} lacks part of a shard and was made with `shard_images` "
                f"{cut['shard_images']}, not {self.settings.get('shard_images')}: delete it first"
            )
        if CONTENTS not in manifest.values:
            cut = {key: cut[key] for key in cut if key not in (CONTENTS, SHARD_CONTENTS)}
        write_json(self.path / UNFINISHED, cut)
        for shard in manifest.shards:
            if _is_cut(self.path, shard):
                file_in(self.path, shard.file).unlink(missing_ok=True)
        (self.path / MANIFEST).unlink()

    def written_settings(self) -> dict[str, Any]:
        """The settings on disk, of a store that was begun or finished."""
        if (self.path / MANIFEST).exists():
            return read_manifest(self.path).values
        settings = read_object(file_in(self.path, UNFINISHED))
        check_fields(self.path / UNFINISHED, settings, MADE_BY, required=False)
        return settings

    def missing(self, shards: int) -> set[int]:
        """Which of shards ``0..shards-1`` are absent or cut; of a finished store, none."""
        if self.finished:
            return set()
        return {
            number
            for number in range(shards)
            if not _is_whole(self.path, number, self._images(number))
        }

    def _images(self, number: int) -> int | None:
        """How many images shard ``number`` covers; None where the settings don't say."""
        images, size = self.settings.get("images"), self.settings.get("shard_images")
        return min(size, images - number * size) if images and size else None

    def finish(self, shards: int) -> None:
        """Write the manifest over shards ``0..shards-1``; a finished store is left as it is.

        Raises:
            ValueError: a shard is missing or cut.
        """
        if not self.finished:
            settings = self.written_settings()
            settings.pop(SHARD_CONTENTS, None)
            write_manifest(self.path, settings, shards)
        (self.path / UNFINISHED).unlink(missing_ok=True)


def check_same(
    path: Path, was: Mapping[str, Any], now: Mapping[str, Any], *, free: set[str]
) -> None:
    """Compare settings as JSON sees them.

    Raises:
        ValueError: one differs; the message names the first, with both values.
    """
    plain = json.loads(json.dumps(dict(now)))
    for key, value in plain.items():
        if key not in free and was.get(key) != value:
            raise ValueError(
                f"{path} was made with `{key}` {was.get(key)!r}, not {value!r}: "
                f"go on with the same settings or choose another folder"
            )


def _is_cut(folder: Path, shard: ShardEntry) -> bool:
    """Whether a shard is missing or of another size; what is a link or no file at all is refused."""
    path = file_in(folder, shard.file, what="a shard")
    return not path.exists() or regular_file(path).stat().st_size != shard.bytes


def _is_whole(folder: Path, number: int, images: int | None) -> bool:
    """Whether a shard is there with a row or a reason for each of its ``images`` (None: any number).

    Raises:
        ValueError: its name is taken by a link, a folder or the like, which is not ours to replace.
    """
    path = file_in(folder, shard_name(number), what="a shard")
    if not path.exists():
        return False
    regular_file(path)
    try:
        header = read_header(path)
        check_names(path, header, 0, LABEL_LIMIT)
    except ValueError:
        return False
    return images is None or header.images + len(header.skipped) == images

"""One picture, from bytes or a file to 8-bit RGB, the same way for every source.

Rules, where a file leaves a choice:

- the content decides the format, not the file's extension;
- a rotation noted in EXIF is applied;
- of an animation, the first frame counts;
- transparent pixels are laid on white;
- a picture beyond the limits (:class:`revelio.data.config.Limits`), or of a file beyond 8 bytes a pixel of
  them, is refused: a few kilobytes could ask for any amount of memory;
- 16-bit grey is scaled (65535 -> 255), never clipped; 32-bit pixels have no defined white: refused;
- CMYK goes to RGB by Pillow's plain formula; embedded colour profiles are not applied.
"""

import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from revelio.data.config import Limits
from revelio.data.dataset import ImageError

# Only bitmaps: Pillow would hand an EPS file to another program. HEIF and JXL are there where their plug-ins
# are installed.
FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
    "ICO",
)
FORMATS += ("PCX", "SGI", "QOI", "HEIF", "JXL", "TGA")
# Packages that bring a format, by the suffixes of its files.
PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif"}
PLUGINS |= {".jxl": "pillow-jxl-plugin"}
# What cameras write unprocessed: many are TIFFs to Pillow, whose first picture is a thumbnail.
# fmt: off
RAW = frozenset(
    (".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mos", ".mrw")
) | {".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"}
# fmt: on
ARCHIVES = frozenset((".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"))
LIMITS = Limits()
BYTES_A_PIXEL = 8

NO_WHITE = "without a defined white: save it in 8 or 16 bits"

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The filter of warnings that Pillow gives, in the form in which Python keeps them.
_OF_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\b"), 0)


def read_picture(source: bytes | Path, image_id: str, limits: Limits = LIMITS) -> Image.Image:
    """Read one picture as 8-bit RGB, upright, on white.

    Args:
        source: the content of an image file, or where the file is.
        image_id: what a message calls the picture.
        limits: how large it may be.

    Raises:
        ImageError: it can't be read whole; says why.
    """
    with decoded(source, image_id, limits) as image:
        return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture that Pillow has opened as 8-bit RGB, upright, on white, without its file's notes.

    A rotation that was applied must not be found again by whoever gets the picture.

    Raises:
        ValueError: its pixels have no defined white.
    """
    if image.mode == "RGB" and not image.info:
        return image
    found = _to_rgb(_upright(image))
    found.info = {}
    return found


@contextmanager
def decoded(
    source: bytes | Path, image_id: str, limits: Limits = LIMITS
) -> Iterator[ImageFile.ImageFile]:
    """A picture as it is stored, decoded: masks need its own mode. Arguments as :func:`read_picture`'s.

    Raises:
        ImageError: it can't be read whole, or what is done with it fails; says why.
    """
    content = _content(source, image_id, limits) if isinstance(source, Path) else source
    if not content:
        raise ImageError(image_id, "it is empty (0 bytes)")
    try:
        _hush_pillow()
        with Image.open(BytesIO(content), formats=readable()) as image:
            _check_size(*image.size, limits)
            if image.format == "TIFF" and image.mode == "I":
                raise ValueError(f"its pixels are 32-bit integers {NO_WHITE}")
            image.load()
            # Some formats (Windows icons of TIFFs, JPEG 2000) tell their true size only now.
            _check_size(*image.size, limits)
            yield image
    except UnidentifiedImageError as error:
        raise ImageError(image_id, "its content is no known picture format") from error
    except Exception as error:  # Decoders raise nearly anything on a broken file.
        raise ImageError(image_id, " ".join(str(error).split()) or type(error).__name__) from error


def _hush_pillow() -> None:
    """Pass over what Pillow only warns of (a torn EXIF block, odd TIFF tags): the pixels are whole.

    Not by ``catch_warnings``: threads that read side by side would put back one another's filters, and the
    whole process could be left without warnings.
    """
    if warnings.filters[:1] != [_OF_PILLOW]:
        warnings.filterwarnings("ignore", module=_OF_PILLOW[3].pattern)


@cache
def _register_plugins() -> None:
    """Let Pillow know the formats that an installed plug-in reads: phones' HEIC files."""
    Image.init()
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    with suppress(ImportError):
        import_module("pillow_jxl")  # which registers itself


def readable() -> list[str]:
    """The formats that are read here, as Pillow names them."""
    _register_plugins()
    return [name for name in FORMATS if name in Image.OPEN]


def suffixes() -> frozenset[str]:
    """The suffixes of files in these formats, but for that of fractions (PFM), which are refused."""
    _register_plugins()
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in FORMATS) - {".pfm"}


def why_unread(suffix: str) -> str:
    """Why a file of this suffix, in small letters, is no picture here."""
    if suffix in PLUGINS:
        return f"needs the package {PLUGINS[suffix]}"
    if suffix in RAW:
        return "a camera's raw data: convert it"
    if suffix in ARCHIVES:
        return "an archive: unpack it"
    _register_plugins()
    other = Image.registered_extensions().get(suffix)
    return "holds no picture" if other is None else f"the format {other} is not read: convert it"


def opens(path: Path | str) -> bool:
    """Whether a file of any name begins as a picture does; TGA files have no mark of their own."""
    if Path(path).suffix.lower() in RAW:
        return False
    formats = [name for name in readable() if name != "TGA"]
    try:
        _hush_pillow()
        with Image.open(path, formats=formats):
            return True
    except Exception:  # Parsers raise nearly anything on what is no picture.
        return False


def _content(path: Path, image_id: str, limits: Limits) -> bytes:
    most = BYTES_A_PIXEL * limits.max_pixels
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(image_id, "it is not a regular file")
        if status.st_size > most:
            raise ImageError(image_id, f"its file has {status.st_size} bytes, more than {most}")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(image_id, (error.strerror or str(error)).lower()) from error


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise ValueError(
            f"it has {width} x {height} pixels, more than {limits.max_pixels} (max_pixels): shrink or cut "
            "it, or raise that"
        )
    if max(width, height) > limits.max_ratio * min(width, height):
        raise ValueError(
            f"it has {width} x {height} pixels, sides beyond {limits.max_ratio} to 1 (max_ratio): cut it, "
            "or raise that"
        )


def _upright(image: ImageFile.ImageFile | Image.Image) -> Image.Image:
    turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION_TAG, 1))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey_from_16_bits(image).convert("RGB")
    if image.mode == "F":
        raise ValueError(f"its pixels are 32-bit fractions {NO_WHITE}")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _grey_from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int32)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels go beyond 16 bits: save it in 8 or 16 bits")
    # 65535 = 255 * 257, so adding half of 257 rounds to the nearest.
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))

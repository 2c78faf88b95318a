"""Messages count their nouns: `1 image`, never `1 images`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from revelio.wording import plural

ROOT = Path(__file__).parent.parent
ROOMS = ("revelio", "llava_ext", "eval", "scripts")

# Words behind a value after which no counted noun comes, though one of the next words ends in s.
LINKS = re.compile(
    "FROM|M|a|all|an|and|any|are|as|at|but|by|each|every|for|from|have|hold|in|is|it|its|lay|no|not|of|on|or|"
    "tells|than|that|the|this|to|under|was|which|with|without"
)
# Verbs of the third person, and other words in s that are no plurals.
VERBS = re.compile(
    "belongs|brings|class|comes|covers|differs|disagrees|does|drops|ends|fires|fits|gives|goes|has|holds|joins|"
    "keeps|knows|lacks|leaves|less|lies|means|ms|needs|neither|overflows|pass|process|rectifies|s|says|sets|"
    "stands|takes|times|works"
)
# Plural or verb: a noun only behind what is surely a number.
EITHER = {"answers", "lists", "marks", "names", "reviews", "shows"}
# Values that are no counts (names, shapes, words) or are more than one where the text is said.
MEANT = {
    "key labels",
    "shape numbers",
    "told raw pixels",
    "top.source['codes'] codes",
    "tuple(alphas.shape) alphas",
    "tuple(sigmas.shape) sigmas",
    "found bytes",  # the shape of what was found
    "', '.join(map(str, lengths)) tokens",
    "', '.join(map(str, budgets)) tokens",
    "percent(gap) points",
    "height pixels",  # width x height
    "torch.cuda.device_count() GPUs",
    "job.devices processes",
    "job.devices devices",
    "store.images images",  # so many of those
    "status.st_size bytes",
    "size bytes",
    "limit bytes",
    "sent tokens",
    "count numbered images",  # as many as a judge is shown
    "self.num_patches interleaved tokens",  # no square number
    "margin points",
}


def phrase(text: str) -> str:
    """The plural noun at the start of what follows a value, with its adjectives; "" where none is counted."""
    taken: list[str] = []
    for word in text.split(" ")[1:4] if text.startswith(" ") else ():
        bare = re.match(r"[A-Za-z][\w'/-]*", word)  # images/s is a unit
        if bare is None or LINKS.fullmatch(bare.group()) or VERBS.fullmatch(bare.group()):
            return ""
        taken.append(bare.group())
        if re.search(r"[^s'/]s$", bare.group()) or bare.group() in ("indices", "people"):
            return " ".join(taken)
        if bare.group() != word:
            return ""
    return ""


def counted_by_hand(source: str) -> Iterator[str]:
    """Each value of an f-string that stands directly before a plural noun, with that noun."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        for value, after in zip(node.values, node.values[1:], strict=False):
            if not isinstance(value, ast.FormattedValue) or not isinstance(after, ast.Constant):
                continue
            if not (noun := phrase(str(after.value))):
                continue
            said, spec = (
                ast.unparse(value.value),
                ast.unparse(value.format_spec or ast.Constant("")),
            )
            whole = said.startswith("len(") or "," in spec
            a_name = said.isupper() or said.startswith(("plural(", "printable(")) or ".name" in said
            if not a_name and (whole or noun not in EITHER):
                yield f"{said} {noun}"


def test_plural_counts() -> None:
    assert [plural(n, "image") for n in (0, 1, 2, 2500)] == [
        "0 images",
        "1 image",
        "2 images",
        "2,500 images",
    ]
    assert [plural(n, "reply", "replies") for n in (1, 2)] == ["1 reply", "2 replies"]
    assert [plural(n, "pass", "passes", ".3g") for n in (1.0001, 1.5)] == ["1 pass", "1.5 passes"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('f"wrote {n} images"', ["n images"]),
        ('f"{len(x):,} held-out rows of {y}"', ["len(x) held-out rows"]),
        ('f"{n} " "images"', ["n images"]),
        ("f\"{plural(n, 'image')} of cells\"", []),
        ('f"{path} has rows"', []),
        ('f"{path} names rows"', []),
        ('f"{len(x)} names"', ["len(x) names"]),
        ('f"{seconds:.3g} seconds"', ["seconds seconds"]),
        ('f"{rate:.3g} images/s, {share:.0%} of images"', []),
    ],
)
def test_the_walk_sees_counts(source: str, found: list[str]) -> None:
    assert list(counted_by_hand(source)) == found


def test_no_text_counts_a_noun_by_hand() -> None:
    seen = {
        (path.relative_to(ROOT).as_posix(), one)
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for one in counted_by_hand(path.read_text(encoding="utf-8"))
    }
    found = sorted(f"{path}: {one}" for path, one in seen if one not in MEANT)
    assert not found, "count by revelio.wording.plural:\n" + "\n".join(found)
    assert not (unused := MEANT - {one for _, one in seen}), unused

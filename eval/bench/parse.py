r"""Two scores from a judge's reply.

The rule asks for "a single line containing only two values" first. The first line that isn't blank
decides; it may be written in these ways (markdown marks around it do not count):

    8 7      8, 7      8.5/10 7/10      (8, 7)      Scores: 8 and 7
    Assistant 1: 8, Assistant 2: 7            in either order: the labels decide
    Assistant 1: 8 \n Assistant 2: 7          a labelled score a line, the next line too
    Here are the scores: \n 8 7               the scores after a line that announces them

What a reasoning judge thinks first (:mod:`revelio.thinking`) is passed over.

Scores are from 0 to 10: the rule's scale starts at 1, but judges give 0 to an answer that isn't one. All
else is a failure, never a score: prose with numbers in it, a third number, a score above 10 or below 0,
a decimal comma (``8,5 7,5`` is four numbers), one score alone (``8/10``).
"""

import re

from revelio.thinking import ends_within_thinking, without_thinking

LOWEST, HIGHEST = 0.0, 10.0
LONGEST_LINE = 1000  # a longer one is prose; patterns take the square of a line's length
_NUMBER = r"(\d+(?:\.\d+)?)(?:\s*/\s*10(?!\d|\.\d)|\s+out\s+of\s+10)?"
_WORDS = r"(?:the\s+)?(?:overall\s+)?(?:scores?|ratings?|values?)(?:\s+are)?"
_GAP = r"(?:\s*[,;|&]\s*|\s+-\s+|\s+(?:and|vs\.?)\s+|\s+)"
_PAIR = re.compile(rf"(?:{_WORDS}\s*:?\s*)?[(\[]?\s*{_NUMBER}{_GAP}{_NUMBER}\s*[)\]]?\.?", re.I)
_LABELLED = re.compile(
    rf"(?:assistant|answer|response)\s*#?([12])(?:'s\s+score|\s+score)?\s*(?:[:=]|-)\s*{_NUMBER}",
    re.I,
)
# The line that announces the scores.
_INTRODUCTION = re.compile(r"[^\d]*\b(?:scores?|ratings?|values?|evaluation)\b[^\d]*:", re.I)
_BETWEEN = re.compile(r"[\s,;|&.]*(?:and)?[\s,;|&.]*", re.I)


def parse_scores(reply: str) -> tuple[float, float]:
    """The scores of answer 1 and answer 2, as the judge saw them.

    Raises:
        ValueError: there are no two scores where they must stand; says what stood there.
    """
    if ends_within_thinking(reply):
        raise ValueError("the reply ends within its thinking: raise max_tokens")
    lines = [plain for line in without_thinking(reply).splitlines() if (plain := _plain(line))]
    if lines and len(lines[0]) <= LONGEST_LINE and _INTRODUCTION.fullmatch(lines[0]):
        lines = lines[1:]
    if not lines:
        raise ValueError("the reply is empty")
    found = _pair(lines[0]) or _labelled(lines[:1]) or _labelled(lines[:2])
    if found is None:
        raise ValueError(f"the first line holds no two scores: {_short(lines[0])}")
    if not all(LOWEST <= score <= HIGHEST for score in found):
        raise ValueError(f"a score lies outside {LOWEST:g} to {HIGHEST:g}: {_short(lines[0])}")
    return found


def _plain(line: str) -> str:
    # One space for many: patterns take the cube of spaces in a row.
    return " ".join(re.sub(r"[*_`#]", "", line).split())


def _pair(line: str) -> tuple[float, float] | None:
    match = None if len(line) > LONGEST_LINE else _PAIR.fullmatch(line)
    return (float(match[1]), float(match[2])) if match else None


def _labelled(lines: list[str]) -> tuple[float, float] | None:
    """Scores by label, when the lines hold label 1 and label 2 once each and nothing else."""
    line = " ".join(lines)
    if len(line) > LONGEST_LINE:
        return None
    found = [(label, float(score)) for label, score in _LABELLED.findall(line)]
    rest = _LABELLED.split(line)[::3]  # what stands between, before and after the scores
    scores = dict(found)
    if len(found) != 2 or len(scores) != 2 or not all(map(_BETWEEN.fullmatch, rest)):
        return None
    return scores["1"], scores["2"]


def _short(line: str, limit: int = 60) -> str:
    return repr(line if len(line) <= limit else line[: limit - 3] + "...")

"""What judging would take before it is done, and what it took: calls, tokens, price."""

from collections.abc import Sequence
from dataclasses import dataclass

from eval.bench.judge import Judge
from eval.bench.prompts import Request
from revelio.reply_cache import Reply

BYTES_PER_TOKEN = 4.0  # of English text, roughly, with today's tokenizers
OVERHEAD_TOKENS = 10  # of the roles and marks around the two messages
USUAL_REPLY_TOKENS = 200  # two scores and an explanation


@dataclass(frozen=True)
class Rates:
    """Prices of a million tokens; 0 and 0 stand for unknown."""

    sent: float
    received: float

    def price(self, sent: float, received: float) -> float:
        """What so many tokens cost."""
        return (sent * self.sent + received * self.received) / 1e6

    def known(self) -> bool:
        """Whether a price was given."""
        return bool(self.sent or self.received)


def count_tokens(judge: Judge, request: Request) -> int:
    """About how many tokens a request has, by its length in bytes."""
    size = len((judge.system + request.message).encode())
    return round(size / BYTES_PER_TOKEN) + OVERHEAD_TOKENS


def estimate_text(judge: Judge, to_send: Sequence[Request], cached: int, rates: Rates) -> str:
    """Calls, tokens and price of what is still to be sent; ``cached`` requests need no call."""
    calls = len(to_send)
    sent = sum(count_tokens(judge, request) for request in to_send)
    usual, most = calls * min(USUAL_REPLY_TOKENS, judge.max_tokens), calls * judge.max_tokens
    cost = "unknown"
    if rates.known():
        cost = f"about {rates.price(sent, usual):.2f}, at most {rates.price(sent, most):.2f}"
    return (
        f"calls:       {calls} ({cached} of {calls + cached} are in the cache)\n"
        f"tokens sent: about {sent:,} (by length, {BYTES_PER_TOKEN:g} bytes a token)\n"
        f"tokens back: about {usual:,}, at most {most:,}\n"
        f"price:       {cost}\n"
        "nothing was sent"
    )


def spent_text(replies: Sequence[Reply | None], rates: Rates) -> str:
    """The tokens that new replies took, as far as the endpoint counts them; empty if it does not."""
    known = [reply for reply in replies if reply and reply.prompt_tokens is not None]
    if not known:
        return ""
    sent = sum(reply.prompt_tokens or 0 for reply in known)
    received = sum(reply.reply_tokens or 0 for reply in known)
    cost = f", price {rates.price(sent, received):.2f}" if rates.known() else ""
    return f"tokens sent {sent:,}, back {received:,}{cost}"

"""Asking an OpenAI-compatible endpoint, many requests at once.

The client retries what may pass (rate limits, timeouts, 5xx, a broken connection) with growing pauses,
and waits as long as the server asks for by `Retry-After`. What is left is of two kinds: this record got no
reply (the others go on), or the endpoint is no use at all (nothing more is sent).
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

from revelio.bounds import Count, NotNegative, PathFields, Positive, Range
from revelio.reply_cache import Reply

if TYPE_CHECKING:
    from openai import AsyncOpenAI

# So many records without a reply in a row, and none with one between them: the endpoint is down.
HOPELESS = 5
ANSWER_LIMIT = 16 * 2**20
# Statuses of a server that has nothing, or takes nothing, at the address.
METHOD_NOT_ALLOWED = 405
NO_SUCH_PLACE = (404, METHOD_NOT_ALLOWED)


@dataclass(frozen=True, kw_only=True)
class Settings(PathFields):
    """How to reach the endpoint."""

    base_url: str | None = None
    """The endpoint's address, as http://localhost:8000/v1; without it OpenAI's, or OPENAI_BASE_URL."""

    key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key; a server of your own may need none."""

    timeout: Positive = 120.0
    """Seconds to wait for a reply, each try."""

    tries: Count = 6
    """Tries a request gets at rate limits, timeouts and server errors, with growing pauses between."""

    concurrency: Annotated[int, Range(1, 1024)] = 8
    """Requests on their way at once."""


@dataclass(frozen=True, kw_only=True)
class AskingConfig(Settings):
    """The settings of a command that asks an endpoint."""

    estimate: bool = False
    """Only say how many calls and tokens it would take, and what it would cost; send nothing."""

    price_in: NotNegative = 0.0
    """Price of a million tokens sent."""

    price_out: NotNegative = 0.0
    """Price of a million tokens received."""


@dataclass
class Outcome:
    """What came of a batch of requests."""

    sent: int = 0
    unanswered: dict[int, str] = field(default_factory=dict)  # index of the request -> why
    down: str | None = None  # why nothing more was sent
    streak: int = 0


def key_of(settings: Settings) -> str:
    """The key to send; a local server needs none.

    Raises:
        ValueError: no key is set and no ``base_url`` says that another server is meant.
    """
    key = os.environ.get(settings.key_variable)
    if not key and not (settings.base_url or os.environ.get("OPENAI_BASE_URL")):
        raise ValueError(
            f"no API key: set {settings.key_variable}, or give a local server by base_url"
        )
    return key or "none"


def base_address(url: str | None) -> str | None:
    """The address that the client adds ``/chat/completions`` to, also where it was given with it."""
    return url and url.rstrip("/").removesuffix("/chat/completions")


def ask_all(
    bodies: Sequence[Mapping[str, Any]],
    settings: Settings,
    keep: Callable[[int, Reply], str | None],
    failed: Collection[int] = (),
) -> Outcome:
    """Send every body as a chat completion.

    Args:
        bodies: of the requests.
        settings: how to reach the endpoint.
        keep: called with each reply and its index as it comes; gives why nothing more is to be sent, or None.
        failed: indices that got no reply in an earlier run: another failure says nothing of the endpoint.

    Raises:
        ValueError: there is no key for the endpoint, or its address is no address.
    """
    return asyncio.run(_ask_all(bodies, settings, keep, failed))


async def _ask_all(
    bodies: Sequence[Mapping[str, Any]],
    settings: Settings,
    keep: Callable[[int, Reply], str | None],
    failed: Collection[int],
) -> Outcome:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    outcome, waiting = Outcome(), iter(enumerate(bodies))
    client = AsyncOpenAI(
        api_key=key_of(settings),
        base_url=base_address(settings.base_url),
        timeout=settings.timeout,
        max_retries=settings.tries - 1,
        # Packed, an answer could be of any length.
        default_headers={"Accept-Encoding": "identity"},
        http_client=DefaultAsyncHttpxClient(
            event_hooks={"response": [partial(_bound, seconds=settings.timeout)]}
        ),
    )
    async with client:
        workers = min(settings.concurrency, len(bodies))
        await asyncio.gather(
            *(_work(client, waiting, outcome, keep, failed) for _ in range(workers))
        )
    return outcome


async def _bound(response: Any, seconds: float) -> None:
    """Let an answer be read only so far and so long: a server may send bytes without an end."""
    packed = response.headers.get("Content-Encoding", "identity") != "identity"
    until, stream = monotonic() + seconds, response.stream

    # The client's own class of streams: which library it comes from depends on the client's version.
    class Bounded(type(stream)):
        def __init__(self) -> None:
            pass

        async def __aiter__(self) -> AsyncIterator[bytes]:
            count = 0
            async for part in stream:
                count += len(part)
                if packed or count > ANSWER_LIMIT:
                    raise ValueError(f"the answer is packed, or has more than {ANSWER_LIMIT} bytes")
                if monotonic() > until:
                    raise ValueError(f"the answer has not ended after {seconds:g} s")
                yield part

        async def aclose(self) -> None:
            await stream.aclose()

    response.stream = Bounded()


async def _work(
    client: "AsyncOpenAI",
    waiting: Iterator[tuple[int, Mapping[str, Any]]],
    outcome: Outcome,
    keep: Callable[[int, Reply], str | None],
    failed: Collection[int],
) -> None:
    from openai import OpenAIError

    for index, body in waiting:
        try:
            outcome.sent += 1
            reply = _reply(await client.chat.completions.create(**body))
        # A body that claims to be JSON and isn't fails in the client with a plain ValueError.
        except (OpenAIError, ValueError, RecursionError) as error:
            _note(outcome, index, error, index in failed)
        else:
            outcome.streak = 0
            outcome.down = keep(index, reply) or outcome.down
        if outcome.down:
            return


def _note(outcome: Outcome, index: int, error: Exception, failed_before: bool) -> None:
    import openai

    outcome.unanswered[index] = reason = _reason(error)
    # What the server refuses (too long, a content filter) is the record's own fault.
    own = isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError)
    outcome.streak += not (own or failed_before)
    if _hopeless(error) or outcome.streak >= HOPELESS:
        outcome.down = outcome.down or reason


def _hopeless(error: Exception) -> bool:
    """Whether no other request can fare better: nobody listens, the key is refused, no such model."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return False
    refused = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
    no_place = isinstance(error, openai.APIStatusError) and error.status_code == METHOD_NOT_ALLOWED
    return no_place or isinstance(error, (openai.APIConnectionError, *refused))


def _reason(error: Exception) -> str:
    """One line about what went wrong, with the cause that the client hides behind its own words."""
    import openai

    text = " ".join(str(error).split())
    if isinstance(error, openai.APIConnectionError) and error.__cause__ is not None:
        text = f"{text} {' '.join(str(error.__cause__).split())}".strip()
    text = text[:300] or type(error).__name__
    if isinstance(error, openai.APIStatusError) and error.status_code in NO_SUCH_PLACE:
        # Not its query or its user, which may be secrets.
        url = error.request.url.copy_with(query=None, fragment=None, userinfo=b"")
        text += f" (POST {url}{_completed(url.path)})"
    return text


def _completed(path: str) -> str:
    """What an address without the API's version may lack."""
    return "" if "/v1/" in path else "; most servers want a base_url that ends in /v1"


def _reply(completion: Any) -> Reply:
    """The text of a completion.

    Raises:
        ValueError: it is no chat completion; the client does not check what a server sends.
    """
    from openai.types import CompletionUsage
    from openai.types.chat import ChatCompletion, ChatCompletionMessage
    from openai.types.chat.chat_completion import Choice

    if not isinstance(completion, ChatCompletion) or not isinstance(completion.choices, list):
        raise ValueError(
            "the server's answer is no chat completion: is base_url right? (Most end in /v1.)"
        )
    choice = completion.choices[0] if completion.choices else None
    if not isinstance(choice, Choice) or not isinstance(choice.message, ChatCompletionMessage):
        raise ValueError("the server's answer is a chat completion without a message")
    content, usage = choice.message.content, completion.usage
    if not isinstance(content, str | None):
        raise ValueError("the server's answer is a chat completion without a message")
    # Half of a surrogate pair is no text that can be kept.
    text = (content or "").encode(errors="replace").decode()
    cut_off = choice.finish_reason == "length"
    if not isinstance(usage, CompletionUsage):
        return Reply(text, cut_off=cut_off)
    counts = (usage.prompt_tokens, usage.completion_tokens)
    tokens = [one if type(one) is int and 0 <= one < 2**62 else None for one in counts]
    return Reply(text, *tokens, cut_off=cut_off)

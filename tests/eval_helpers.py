"""A small bench folder, and a judge to ask: an OpenAI-compatible server in a thread."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

CATEGORIES = ("conv", "detail", "complex")
Respond = Callable[[dict, int], "Response"]


@dataclass(frozen=True)
class Response:
    """What the server sends back; ``text`` is wrapped into a chat completion unless ``raw`` is given."""

    text: str = "8 6\nBecause."
    status: int = 200
    raw: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0


@dataclass
class Server:
    """A running judge: where it is, and every body it was sent."""

    base_url: str
    bodies: list[dict] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    busiest: int = 0


def completion(text: str) -> bytes:
    """A chat completion as a server sends it."""
    value = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
    return json.dumps(value).encode()


@contextmanager
def judge_server(respond: Respond) -> Iterator[Server]:
    """Serve ``respond(body, number of this request)`` at /v1/chat/completions until the block ends."""
    lock, busy = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.bodies.append(body)
                server.keys.append(self.headers.get("Authorization", ""))
                number = len(server.bodies)
                busy[0] += 1
                server.busiest = max(server.busiest, busy[0])
            answer = respond(body, number)
            time.sleep(answer.seconds)
            with lock:
                busy[0] -= 1
            self._send(answer)

        def _send(self, answer: Response) -> None:
            content = completion(answer.text) if answer.raw is None else answer.raw
            try:
                self.send_response(answer.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                for name, value in answer.headers:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client has stopped waiting

        def log_message(self, format: str, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server = Server(f"http://127.0.0.1:{httpd.server_address[1]}/v1")
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def write_jsonl(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer_rows(model_id: str, questions: int = 6) -> list[dict]:
    return [
        {
            "question_id": number,
            "prompt": f"What is in picture {number}?",
            "answer_id": f"{model_id}-{number}",
            "model_id": model_id,
            "text": f"{model_id} says {number}",
            "metadata": {},
        }
        for number in range(questions)
    ]


def make_bench(folder: Path, questions: int = 6) -> Path:
    """A folder of LLaVA-Bench's layout, two questions an image, and the answers of `tiny`."""
    (folder / "images").mkdir(parents=True)
    asked, contexts = [], []
    for number in range(questions):
        image = f"{number // 2:03d}.jpg"
        asked.append(
            {
                "image": image,
                "text": f"What is in picture {number}?",
                "category": CATEGORIES[number % 3],
                "question_id": number,
            }
        )
        if number % 2 == 0:
            colour = (40 * number, 255 - 40 * number, 90)
            Image.new("RGB", (20, 14), colour).save(folder / "images" / image)
            contexts.append({"id": image[:3], "image": image, "caption": f"A plain {number}."})
    write_jsonl(folder / "questions.jsonl", asked)
    write_jsonl(folder / "context.jsonl", contexts)
    write_jsonl(folder / "answers_gpt4.jsonl", answer_rows("gold", questions))
    write_jsonl(folder / "tiny.jsonl", answer_rows("tiny", questions))
    rules = {
        f"llava_bench_{name}": {"role": "Assistant", "prompt": f"Two scores for {name}."}
        for name in CATEGORIES
    }
    (folder / "rule.json").write_text(json.dumps(rules), encoding="utf-8")
    return folder


def review_row(number: int, category: str, scores: Sequence[float] | None, **more: object) -> dict:
    """One line of LLaVA's own review form."""
    row = {"id": number + 1, "question_id": number, "category": f"llava_bench_{category}"}
    return row | {"tuple": scores if scores is None else list(scores)} | more

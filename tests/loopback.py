"""A judge's server on loopback, that judges as a test says and misbehaves when a test wants it to."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PARTS = re.compile(r"#(\w{16}) response A\n(.*)\n#\1 response B\n(.*)\n#\1 end", re.DOTALL)


class Server(ThreadingHTTPServer):
    """Judges by length, unless `reply` says otherwise; the first requests meet the `faults`, in their order."""

    daemon_threads = True
    request_queue_size = 128  # all requests of a step come at once

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[Any] = []
        self.reply: Callable[[str, str, str], Any] = longer
        self.questions: list[tuple[str, str]] = []
        self.answer: Callable[[str], Any] | None = None
        """To all that does not compare two responses; what was asked is in ``texts``."""
        self.texts: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.key: str | None = None
        self.delay_seconds = 0.0
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


def verdict(fence: str, winner: str) -> str:
    return json.dumps({"id": fence, "verdict": winner})


def longer(fence: str, a: str, b: str) -> str:
    return "I think.\n" + verdict(fence, "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B")


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        """Silent."""

    def send(self, status: int, body: Any, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        wrong = self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}"
        said = {"error": {"message": f"bad key {self.headers['Authorization']}"}} if wrong else {"object": "list"}
        self.send(401 if wrong else 200, said if wrong else said | {"data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        text = body["messages"][0]["content"]
        match = PARTS.search(text)
        assert match or self.server.answer, text
        with self.server.lock:
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
            if match:
                self.server.questions.append((match[2], match[3]))
            else:
                self.server.texts.append(text)
            fault = self.server.faults.pop(0) if self.server.faults else None
        time.sleep(self.server.delay_seconds)
        with self.server.lock:
            self.server.running -= 1
        if callable(fault):
            fault(self)
        elif fault == "hang":
            time.sleep(1.0)
        elif fault == "no completion":
            self.send(200, {"detail": "try later"})
        elif isinstance(fault, int):
            self.send(fault, {"error": {"message": f"no {self.headers['Authorization']}"}}, Retry_After="0")
        else:
            content = self.server.reply(match[1], match[2], match[3]) if match else self.server.answer(text)
            finish = "stop"
            if content == "cut off":  # after a line that reads like a verdict
                content, finish = verdict(match[1] if match else "", "A"), "length"
            choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content}}
            self.send(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})


@contextmanager
def serving() -> Iterator[Server]:
    """A server that runs."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

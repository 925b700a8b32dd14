"""The page's server: on this machine alone, for whoever has the token of its address.

- It listens on 127.0.0.1. The address holds a random token, which another user or a web page cannot guess.
- `Host` must be this address, so that a name that some site points at 127.0.0.1 (DNS rebinding) gets nothing; what
  changes anything must come from the page itself (`Origin`).
- The page may run its own script and style, known by their hashes, and load nothing. Texts reach it as JSON and are put
  into it as text; the browser refuses to read any as HTML (`require-trusted-types-for`).
"""

import base64
import hashlib
import hmac
import json
import secrets
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from gopo_lightning.data.json_lines import dumps
from gopo_lightning.human.session import Session

MAX_BODY_BYTES = 2**20
_FOLDER = Path(__file__).parent


class RankingServer:
    """Serves the page of ``session`` from its construction until ``close``.

    Args:
        session: what is to be ordered.
        port: 0 takes a free one.

    Raises:
        ValueError: the port is taken.
    """

    def __init__(self, session: Session, port: int = 0) -> None:
        self.token = secrets.token_urlsafe(24)
        handler = type("Handler", (_Handler,), {"session": session, "token": self.token, "page": _page()})
        try:
            self._server = _Server(("127.0.0.1", port), handler)
        except (OSError, OverflowError) as error:
            raise ValueError(f"port={port} cannot be used ({error}). Name another; 0 takes a free one.") from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="rank", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Of the page, with its token."""
        return f"http://127.0.0.1:{self._server.server_port}/{self.token}/"

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


def _page() -> tuple[bytes, str]:
    """The page, and the policy that lets nothing else into it."""
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    page = (_FOLDER / "page.html").read_text(encoding="utf-8")
    page = page.replace("/* page.css */", style).replace("/* page.js */", script)
    rules = [
        "default-src 'none'",
        f"style-src {_hash(style)}",
        f"script-src {_hash(script)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return page.encode(), "; ".join(rules)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    session: Session
    token: str
    page: tuple[bytes, str]
    timeout = 30
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "rank", ""

    def do_GET(self) -> None:
        """The page, or JSON."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """A verdict, or a skip."""
        self._answer(self._post)

    def _answer(self, respond: Callable[[str], tuple[bytes, str]]) -> None:
        try:
            self._check_host()
            _, token, path = ([*self.path.split("/", 2), "", ""])[:3]
            if not hmac.compare_digest(token.encode(), self.token.encode()):
                raise _Refused(HTTPStatus.NOT_FOUND, "not found: open the whole address that was printed")
            content, kind = respond(path)
            self._send(HTTPStatus.OK, content, kind)
        except _Refused as refused:
            self.close_connection = True  # its body may be unread
            self._send(refused.status, dumps({"error": str(refused)}).encode(), "application/json")

    def _get(self, path: str) -> tuple[bytes, str]:
        if path == "":
            return self.page[0], "text/html; charset=utf-8"
        if path == "state":
            return _json(self.session.state())
        if path.startswith("groups/"):
            try:
                return _json(self.session.group(path.removeprefix("groups/")))
            except KeyError:
                raise _Refused(HTTPStatus.CONFLICT, "this group is not asked about any more") from None
        raise _Refused(HTTPStatus.NOT_FOUND, "not found")

    def _post(self, path: str) -> tuple[bytes, str]:
        if self.headers.get("Origin") != f"http://{self.headers['Host']}":
            raise _Refused(HTTPStatus.FORBIDDEN, "not sent by this page")
        actions = {"rank": self.session.rank, "skip": self.session.skip, "reopen": self.session.reopen}
        if path not in actions:
            raise _Refused(HTTPStatus.NOT_FOUND, "not found")
        try:
            actions[path](self._body())
        except KeyError:
            raise _Refused(HTTPStatus.CONFLICT, "this group is not asked about any more") from None
        except ValueError as error:
            raise _Refused(HTTPStatus.BAD_REQUEST, str(error)) from None
        except OSError as error:
            raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR, f"it cannot be written: {error}") from None
        return _json(self.session.state())

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json" or not length.isdecimal():
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "not JSON")
        if int(length) > MAX_BODY_BYTES:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MAX_BODY_BYTES} bytes")
        body = json.loads(self.rfile.read(int(length)))
        if not isinstance(body, dict):
            raise ValueError("not a JSON object")
        return body

    def _check_host(self) -> None:
        port = self.server.server_port  # type: ignore[attr-defined]
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            raise _Refused(HTTPStatus.MISDIRECTED_REQUEST, f"this is 127.0.0.1:{port} alone; forward the same port")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("Content-Security-Policy", self.page[1]),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the address holds the token."""


def _json(value: Any) -> tuple[bytes, str]:
    return dumps(value).encode(), "application/json"

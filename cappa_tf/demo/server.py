"""HTTP server of the demo page, for browsers on this machine.

    GET  /           the page, and its .css and .js files
    GET  /about      JSON: what the model can do
    GET  /example/N  an example image, if there are any
    POST /caption    a request of `options.parse`; JSON of `caption`
    POST /rank       the same; JSON of `rank`

An error is JSON, {"error": "..."}. A page of another site cannot use the
server: its name must be one of this machine (a site could else give its own
name this address), the origin of a POST the server's own, and the type of its
body one that browsers send to other origins only if these agree.
"""

import errno
import http
import http.server
import importlib.resources
import ipaddress
import json
import mimetypes
import os
import pathlib
import socketserver
import threading
import urllib.parse

from absl import logging

from cappa_tf.data.images.image_files import UnusableError
from cappa_tf.demo.answers import RefusedError
from cappa_tf.demo.batches import BusyError
from cappa_tf.demo.options import parse

LOOPBACK = "127.0.0.1"
BODY_TYPE = "application/octet-stream"
# What the options may add to the size of an image.
_MOST_OPTIONS_BYTES = 400_000
_SECONDS_TO_END = 5.0
_CHUNK_BYTES = 1 << 16
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    # The page may load its own two files, show images that it has or gets as
    # data, and talk to this server: nothing else.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class _Problem(Exception):
    """A request that gets an error of HTTP as its answer."""

    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class DemoServer(http.server.ThreadingHTTPServer):
    """Serves the page; `serve_forever` answers, a thread each request.

    It listens when it is made, so that an address in use is known at once, and
    answers once `answers` is set.

    Args:
        port: Port; 0 for any that is free.
        host: Address to listen at, by default that of the loopback interface.
        max_bytes: Maximum size of an image file.
        examples: Paths of image files that the page offers.

    Attributes:
        answers: `ModelAnswers` or `ServedAnswers`.

    Raises:
        OSError: If the address cannot be had; the message says why.
    """

    daemon_threads = True
    # Connections that the browser keeps open would be waited for.
    block_on_close = False
    request_queue_size = 128

    def __init__(self, port, host=LOOPBACK, max_bytes=20_000_000, examples=()):
        self.answers = None
        self._examples = [os.path.basename(path) for path in examples]
        self.max_bytes = max_bytes
        self.host = host
        folder = importlib.resources.files("cappa_tf.demo") / "page"
        self.files = {
            path: ((folder / name).read_bytes(), kind)
            for path, (name, kind) in _FILES.items()
        }
        for i, path in enumerate(examples):
            content = pathlib.Path(path).read_bytes()
            kind = mimetypes.guess_type(path)[0] or BODY_TYPE
            self.files[f"/example/{i}"] = (content, kind)
        self._busy, self._changed = 0, threading.Condition()
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise OSError(
                    f"port {port} of {host} is in use; choose another one, or "
                    "0 for any that is free"
                ) from None
            raise OSError(f"cannot listen at {host}:{port}: {error}") from None

    def server_bind(self):
        """Binds the socket, without asking for the name of the machine."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    @property
    def url(self):
        """Address of the page."""
        return f"http://{self.host}:{self.server_port}/"

    def knows(self, name):
        """Whether a Host header names this machine, with any port."""
        try:
            host = urllib.parse.urlsplit(f"//{name}").hostname or ""
            if host in ("localhost", self.host):
                return True
            # Another site's name can lead here, an address cannot.
            return bool(ipaddress.ip_address(host))
        except ValueError:
            return False

    def about(self):
        """What the page has to know."""
        return {
            **self.answers.about(),
            "max_bytes": self.max_bytes,
            "examples": self._examples,
        }

    def begin(self):
        """Counts a request that is being answered."""
        with self._changed:
            self._busy += 1

    def end(self):
        """Counts it as answered."""
        with self._changed:
            self._busy -= 1
            self._changed.notify_all()

    def stop(self):
        """Ends: what is being computed is answered, what waits is refused."""
        if self.answers is not None:
            self.answers.close()
        with self._changed:
            self._changed.wait_for(lambda: not self._busy, _SECONDS_TO_END)
        self.server_close()

    def handle_error(self, request, client_address):
        """Says nothing about a browser that has left."""
        del request, client_address


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "cappa-demo", ""
    timeout = 60.0  # seconds without a byte

    def do_GET(self):
        self._answer(self._get)

    def do_POST(self):
        self._answer(self._post)

    def log_message(self, *arguments):
        """Logs no requests, only errors of this program."""

    def _answer(self, function):
        self.server.begin()
        try:
            try:
                status, kind, body = http.HTTPStatus.OK, *function()
            except _Problem as problem:
                status, (kind, body) = problem.status, _error(problem)
            except (ValueError, RefusedError, UnusableError) as error:
                status = http.HTTPStatus.UNPROCESSABLE_ENTITY
                kind, body = _error(error)
            except BusyError as error:
                status = http.HTTPStatus.SERVICE_UNAVAILABLE
                kind, body = _error(error)
            except OSError:
                self.close_connection = True  # The browser has left.
                return
            except Exception:
                logging.exception("demo: %s %s failed", self.command, self.path)
                status = http.HTTPStatus.INTERNAL_SERVER_ERROR
                kind, body = _error(
                    "The demo failed; the terminal that runs it shows why"
                )
            self._send(status, kind, body)
        finally:
            self.server.end()

    def _send(self, status, kind, body):
        self.send_response(status)
        headers = {**_HEADERS, "Content-Type": kind}
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _get(self):
        self._check_host()
        path = urllib.parse.urlsplit(self.path).path
        if path == "/about":
            return _json(self.server.about())
        if path not in self.server.files:
            raise _Problem(http.HTTPStatus.NOT_FOUND, f"There is no {path}")
        content, kind = self.server.files[path]
        return kind, content

    def _post(self):
        # Until the body has been read, another request cannot follow.
        kept, self.close_connection = self.close_connection, True
        self._check_host()
        self._check_origin()
        answers = self.server.answers
        functions = {"/caption": answers.caption, "/rank": answers.rank}
        path = urllib.parse.urlsplit(self.path).path
        if path not in functions:
            raise _Problem(http.HTTPStatus.NOT_FOUND, f"There is no {path}")
        body = self._body()
        self.close_connection = kept
        options, content = parse(body)
        if len(content) > self.server.max_bytes:
            raise self._too_large()
        return _json(functions[path](content, options))

    def _check_host(self):
        name = self.headers.get("Host", "")
        if not self.server.knows(name):
            raise _Problem(
                http.HTTPStatus.FORBIDDEN,
                f"This server is {self.server.url}. Received: the name {name}",
            )

    def _check_origin(self):
        """Refuses what a browser sends for the page of another site."""
        origin = self.headers.get("Origin")
        own = f"http://{self.headers['Host']}"
        site = self.headers.get("Sec-Fetch-Site", "same-origin")
        if origin not in (None, own) or site not in ("same-origin", "none"):
            raise _Problem(
                http.HTTPStatus.FORBIDDEN,
                f"Only the page {own} may ask. Received: origin {origin}",
            )
        kind = self.headers.get_content_type()
        if kind != BODY_TYPE:
            raise _Problem(
                http.HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                f"The body must be {BODY_TYPE}. Received: {kind}",
            )

    def _body(self):
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or "Transfer-Encoding" in self.headers:
            raise _Problem(
                http.HTTPStatus.LENGTH_REQUIRED,
                "A request must say its length",
            )
        most = self.server.max_bytes + _MOST_OPTIONS_BYTES
        if int(length) > most:
            self._skip(min(int(length), 4 * most))
            raise self._too_large()
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the body ended early")
        return body

    def _too_large(self):
        return _Problem(
            http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The file is larger than {self.server.max_bytes / 1e6:g} MB",
        )

    def _skip(self, count):
        """Reads and forgets; else the browser would not read the answer."""
        while count > 0:
            some = self.rfile.read(min(count, _CHUNK_BYTES))
            if not some:
                break
            count -= len(some)


def _json(value):
    body = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return "application/json; charset=utf-8", body.encode(errors="replace")


def _error(message):
    return _json({"error": str(message)})

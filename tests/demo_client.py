"""A demo in this process, and requests to it over a real connection."""

import contextlib
import http.client
import io
import json
import threading

import numpy as np
from PIL import Image

from cappa_tf.demo.server import BODY_TYPE, DemoServer


@contextlib.contextmanager
def running(answers, **options):
    """Serves answers at a free port; yields the `DemoServer`."""
    server = DemoServer(0, **options)
    server.answers = answers
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.stop()


def request(server, path, body=None, headers=None):
    """Status, headers and content of an answer; JSON as Python's values."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", server.server_port, timeout=120
    )
    method = "GET" if body is None else "POST"
    given = {} if body is None else {"Content-Type": BODY_TYPE}
    try:
        connection.request(method, path, body, given | (headers or {}))
        response = connection.getresponse()
        content = response.read()
        kind = response.headers.get_content_type()
        if kind == "application/json":
            content = json.loads(content)
        return response.status, response.headers, content
    finally:
        connection.close()


def ask(server, path, image, **options):
    """Status and JSON of a request for an image."""
    body = json.dumps(options).encode() + b"\n" + image
    status, _, answer = request(server, path, body)
    return status, answer


def png(seed=0, height=20, width=30):
    """The file of an image of random pixels."""
    random = np.random.RandomState(seed)
    pixels = random.randint(256, size=(height, width, 3)).astype("uint8")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()

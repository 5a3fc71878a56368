"""A real https server on this host, with whatever can go wrong at one."""

import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import which

import pytest


class Server(ThreadingHTTPServer):
    """Serves `files`; the rest says what goes wrong, by path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.status: dict[str, int] = {}
        self.redirects: dict[str, str] = {}
        self.cuts: Counter[str] = Counter()  # so many times the connection ends in the middle
        self.seconds: dict[str, float] = {}  # a pause in the middle
        self.promised: dict[str, int] = {}  # bytes that HEAD tells of
        self.requests: Counter[tuple[str, str]] = Counter()
        self.url = f"https://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        pass  # clients are killed here, and hang up


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        content = self.server.files.get(path, b"")
        if not self.answer(content[: len(content) // 2]):
            return
        time.sleep(self.server.seconds.get(path, 0))
        if self.server.cuts[path]:
            self.server.cuts[path] -= 1
            self.close_connection = True
            return
        self.wfile.write(content[len(content) // 2 :])

    def answer(self, start: bytes) -> bool:
        path = self.path.partition("?")[0]
        self.server.requests[self.command, self.path] += 1
        status = self.server.status.get(path, 200 if path in self.server.files else 404)
        if path in self.server.redirects:
            status = 302
        self.send_response(status)
        size = len(self.server.files[path]) if status == 200 else 0
        if self.command == "HEAD":
            size = self.server.promised.get(path, size)
        self.send_header("Content-Length", str(size))
        if status == 302:
            self.send_header("Location", self.server.redirects[path])
        self.end_headers()
        if status == 200:
            self.wfile.write(start)
            self.wfile.flush()
        return status == 200

    def log_message(self, *_words) -> None:
        pass


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> Path:
    """Certificate and key of 127.0.0.1 in one file."""
    if not which("openssl"):
        pytest.skip("no openssl command to make a certificate with")
    file = tmp_path_factory.mktemp("certificate") / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(file), "-out", str(file) + ".crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    file.write_text(file.read_text() + Path(f"{file}.crt").read_text())
    return file


@pytest.fixture
def server(certificate) -> Iterator[Server]:
    pytest.importorskip("aiohttp")
    server = Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    # The handshake belongs in the thread of the connection: in `accept` one slow client would stop all others.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()

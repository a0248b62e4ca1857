"""Servers that send anything at all: one sentence, in time, whatever comes."""

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from onpath.config.sections import Teacher
from onpath.engines.remote.host import Nonsense
from onpath.engines.remote.wire import Line
from onpath.system.errors import UserError
from tests.faults.servers import TRICKLES, WIRE


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads, allow_reuse_address = True, True
    first, then = b"", b""
    pause = 0.02


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Server)
        asked = b""
        while not asked.endswith(b"\r\n\r\n{}"):
            asked += self.request.recv(65536)
        first, then = self.server.first, self.server.then
        try:
            self.request.sendall(first)
            end = time.monotonic() + 3
            while (then or self.server.pause == 0) and time.monotonic() < end:
                self.request.sendall(then)
                time.sleep(max(0.01, self.server.pause))
            self.request.shutdown(socket.SHUT_WR)
            self.request.recv(1)
        except OSError:  # the other side has left
            pass


@pytest.fixture(scope="module")
def server() -> Iterator[_Server]:
    made = _Server(("127.0.0.1", 0), _Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onpath.engines.remote.wire._FIRST_WAIT", 0.0)
    monkeypatch.setattr("onpath.engines.remote.wire._LONGEST_WAIT", 0.0)


def asked(server: _Server, timeout: float) -> None:
    url = f"http://127.0.0.1:{server.server_address[1]}"
    section = Teacher(model="m", engine="vllm", url=url, patience=0.0, timeout=timeout)

    def understand(_: int, answer: object) -> None:
        if not isinstance(answer, dict) or "choices" not in answer:
            raise Nonsense("no answer at all")

    line = Line(section, "teacher")
    try:
        line.ask("/v1/x", [{}], understand)
    finally:
        line.hosts[0].client.close()


@pytest.mark.parametrize("name", TRICKLES)
def test_what_trickles_ends_in_time(name: str, server: _Server) -> None:
    server.first, server.then, words = TRICKLES[name]
    server.pause = 0.02 if server.then else 0.0
    begun = time.monotonic()
    with pytest.raises(UserError, match=words):
        asked(server, timeout=0.25)
    assert time.monotonic() - begun < 2.5, "what trickles goes on for 3 s"


@pytest.mark.parametrize("name", WIRE)
def test_whatever_comes(name: str, server: _Server) -> None:
    server.first, words = WIRE[name]
    server.then, server.pause = b"", 0.02
    with pytest.raises(UserError, match=words) as caught:
        asked(server, timeout=5.0)
    assert str(caught.value).startswith("teacher.url: ")
    assert len(str(caught.value)) < 500
    assert not set("\n\x1b") & set(str(caught.value))

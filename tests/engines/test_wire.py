"""A hostile server: bytes of any kind, answers without an end, keys that must not be printed."""

import gzip
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from onpath.config.sections import Teacher
from onpath.data.render import Renderer
from onpath.engines.remote.chat import ChatEngine
from onpath.engines.remote.host import Host, Nonsense, _body, api_key
from onpath.engines.remote.server import ServerEngine
from onpath.engines.remote.transfer import _address_towards
from onpath.engines.remote.wire import Line, Server, _models
from onpath.records import Prompt, Sampling
from onpath.system.errors import UserError, guarded
from tests.conftest import make_tokenizer
from tests.mutate import mutated

KEY = "sk-0123456789abcdef"
Reply = Callable[[BaseHTTPRequestHandler, bytes], None]


class Hostile:
    """Answers every request with what `reply` writes."""

    def __init__(self) -> None:
        self.reply: Reply = sending(b"{}")
        hostile = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hostile.reply(self, body)

            do_GET = do_POST

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def sending(data: bytes, *, status: int = 200, **headers: str) -> Reply:
    def reply(handler: BaseHTTPRequestHandler, _: bytes) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return reply


@pytest.fixture(scope="module")
def hostile() -> Iterator[Hostile]:
    server = Hostile()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onpath.engines.remote.wire._FIRST_WAIT", 0.0)
    monkeypatch.setattr("onpath.engines.remote.wire._LONGEST_WAIT", 0.0)


def line(hostile: Hostile, **options: Any) -> Line:
    section = {"model": "m", "engine": "vllm", "url": hostile.url, "patience": 0.0, **options}
    return Line(Teacher.model_validate(section), "teacher")


def test_a_body_that_trickles_ends_with_the_time_limit(hostile: Hostile) -> None:
    def trickle(handler: BaseHTTPRequestHandler, _: bytes) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    hostile.reply = trickle
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"no answer .*not whole after 0\.3 s"):
        line(hostile, timeout=0.3).post("/v1/x", {})
    assert time.monotonic() - begun < 3


def test_a_flood_is_cut_off(hostile: Hostile) -> None:
    hostile.reply = sending(b" " * (6 * 2**20))
    with pytest.raises(UserError, match="more than 4 MiB to a request for less"):
        line(hostile).post("/v1/x", {})
    long = {"prompt": [1] * 1000, "prompt_logprobs": 4, "max_tokens": 1}
    assert line(hostile).ask("/v1/x", [], lambda i, a: a) == []
    with pytest.raises(UserError, match="not JSON"):  # not the length: this request may be answered at length
        line(hostile).post("/v1/x", long)


def test_nothing_is_unpacked(hostile: Hostile) -> None:
    hostile.reply = sending(gzip.compress(b" " * 2**24), Content_Encoding="gzip")
    with pytest.raises(UserError, match="a compressed answer"):
        line(hostile).post("/v1/x", {})


@pytest.mark.parametrize("data", [b"[" * 200_000, b"\xff\xfe", b"nan nan", b'{"a": ' + b"9" * 5000 + b"}"])
def test_what_is_no_json(data: bytes, hostile: Hostile) -> None:
    hostile.reply = sending(data)
    with pytest.raises(UserError, match="not JSON"):
        line(hostile).post("/v1/x", {})


@pytest.mark.parametrize("status", [400, 401, 403, 404])
@pytest.mark.parametrize(
    "body",
    [
        f"wrong key {KEY}",
        json.dumps({"error": f"key {KEY} is wrong"}),
        json.dumps({"error": {"message": f"Bearer {KEY}\x1b[2J"}}),
        json.dumps([KEY]),
        "[" * 100_000,
        "",
    ],
    ids=["text", "error", "message", "list", "deep", "empty"],
)
def test_a_key_is_never_printed(
    status: int, body: str, hostile: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONPATH_API_KEY", f" {KEY}\n")
    hostile.reply = sending(body.encode(), status=status)
    with pytest.raises(UserError, match=f"refuses a request with status {status}") as caught:
        line(hostile).post("/v1/x", {})
    assert KEY not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("bad", ["sk-“curly”", "sk-one two", "sk-é", "sk-\ttab"])
def test_a_key_that_is_none_is_refused_at_the_start(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONPATH_API_KEY", bad)
    with pytest.raises(UserError, match="ONPATH_API_KEY holds a space, a line break or a letter") as caught:
        api_key()
    assert bad not in str(caught.value)
    monkeypatch.setenv("ONPATH_API_KEY", f"{KEY}\r\n")
    assert api_key() == KEY


def test_a_password_in_the_address_is_not_printed(hostile: Hostile) -> None:
    hostile.reply = sending(b"", status=403)
    url = hostile.url.replace("//", "//me:secret-word@")
    with pytest.raises(UserError, match="403") as caught:
        line(hostile, url=url).post("/v1/x", {})
    assert "secret-word" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000"),  # a dummy key, part of the host's name
        ("http://u:8000@127.0.0.1:8000", "http://u:…@127.0.0.1:8000"),
        ("http://u:p%40ss@127.0.0.1:8000", "http://u:…@127.0.0.1:8000"),
        ("http://u:pä^ b@127.0.0.1:8000/v1", "http://u:…@127.0.0.1:8000"),
        ("http://local@127.0.0.1:8000", "http://local@127.0.0.1:8000"),
    ],
)
def test_what_is_shown_of_an_address_is_not_what_is_asked(
    given: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key was cut out of the name that `rollout.push: nccl` looks up."""
    monkeypatch.setenv("ONPATH_API_KEY", "local")
    host = Host(given, Teacher(engine="vllm", url=given), "teacher")
    assert host.url == shown
    assert host.address == given.removesuffix("/v1")
    assert _address_towards(host) == "127.0.0.1"


SCORES = {
    "model": "m",
    "choices": [
        {
            "index": 0,
            "prompt_token_ids": [1, 5, 6],
            "prompt_logprobs": [
                None,
                {"5": {"logprob": -0.1}, "7": {"logprob": -2.5}},
                {"6": {"logprob": -0.05, "rank": 1}, "9": {"logprob": -3.1}},
            ],
        }
    ],
}
WRITTEN = {
    "model": "m",
    "choices": [{"index": 0, "token_ids": [5, 2], "logprobs": {"token_logprobs": [-0.5, -0.1]}}],
}
SAID = {"choices": [{"message": {"role": "assistant", "content": "12 \u2019"}, "finish_reason": "stop"}]}
MODELS = {"data": [{"id": "m", "root": "m", "max_model_len": 512}]}


@pytest.mark.parametrize("kind", ["scores", "completion", "chat", "models"])
def test_five_hundred_bad_answers_of_each_kind(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes flipped, values swapped, types changed: understood, or one sentence; never a traceback."""
    monkeypatch.setattr("onpath.engines.remote.wire._TRIES_OF_NONSENSE", 1)
    monkeypatch.setattr(Host, "exchange", lambda self, method, path, body=None: parsed(path))
    section = Teacher(model="m", engine="vllm", url="http://x", patience=0.0, concurrency=1)
    renderer = Renderer(make_tokenizer())
    current = json.dumps(MODELS).encode()

    def parsed(path: str) -> Any:
        return _body(current)

    server = Server(section, "teacher", ["m"])
    engine = ServerEngine(server, renderer, stop_ids=frozenset({2}), vocabulary=12)
    chat = ChatEngine(Line(section, "teacher"), "m", renderer, stop_ids=frozenset({2}))
    asks: dict[str, tuple[Any, Callable[[], Any]]] = {
        "scores": (SCORES, lambda: engine.score_top([[1, 5]], [[6]], k=2)),
        "completion": (WRITTEN, lambda: engine.continue_from([[1, 5, 6]], Sampling(max_new_tokens=4))),
        "chat": (
            SAID,
            lambda: chat.answer([Prompt(id="0", text="7")], [[1]], Sampling(max_new_tokens=4), keys=["k"]),
        ),
        "models": (MODELS, lambda: server.get("/v1/models", _models)),
    }
    good, ask = asks[kind]
    current = json.dumps(good).encode()
    ask()
    rng, said = random.Random(kind), list[str]()
    for _ in range(500):
        current = mutated(good, rng)
        try:
            ask()
        except UserError as error:
            said.append(str(error))
    assert len(said) > 200
    assert max(map(len, said)) < 600


def test_sentences_on_a_terminal_name_controls(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> int:
        raise UserError("a\x1b[2Jb\n\u202ec " + "k, " * 20_000)

    assert guarded(run) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("onpath: a⟨001B⟩[2Jb ⟨202E⟩c k, k,")
    assert len(shown) < 2100


def test_nonsense_is_an_exception_of_its_own() -> None:
    assert not issubclass(Nonsense, UserError)

"""What a server may send in place of an answer, as bytes on the wire; docs/make_reliability.py counts it.

A float is a pause, in seconds, that is repeated for as long as anybody listens.
"""

import gzip

_OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
_JSON = _OK + b"Content-Type: application/json\r\n"


def _whole(body: bytes, head: bytes = _JSON) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


_CLOSED = "no answer from"
_SLOW = r"no answer .*not whole after 0\.25 s"
_NONE = "talks nonsense|no answer from"
TRICKLES: dict[str, tuple[bytes, bytes, str]] = {
    "silence": (b"", b"", _SLOW),
    "status line": (b"HTTP/1.1 ", b"2", "no answer"),
    "headers": (_OK, b"X-A: b\r\n", "no answer"),
    "one header": (_OK + b"X: ", b"a", _SLOW),
    "interim answers": (b"", b"HTTP/1.1 102 Processing\r\n\r\n", _SLOW),
    "body": (_OK + b"\r\n", b" ", _SLOW),
    "body of a length": (_OK + b"Content-Length: 1000\r\n\r\n{", b" ", _SLOW),
    "chunks": (_OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", _SLOW),
    "a chunk's length": (_OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0", "no answer"),
}
"""Name → what comes first, what comes every 20 ms after it, words of the sentence."""

WIRE: dict[str, tuple[bytes, str]] = {
    "closes at once": (b"", _CLOSED),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", _CLOSED),
    "binary": (b"\x15\x03\x01\x00\x02\x02\x16", _CLOSED),
    "HTTP/0.9": (b"<html>hello</html>", _CLOSED),
    "a status that is none": (b"HTTP/1.1 abc OK\r\n\r\n", _CLOSED),
    "status 99": (b"HTTP/1.1 99 No\r\n\r\n", _CLOSED),
    "status 999": (_whole(b"{}", b"HTTP/1.1 999 No\r\n"), "status 999|no answer"),
    "a header without a colon": (_OK + b"nonsense\r\n\r\n{}", _CLOSED),
    "a header of 200,000 bytes": (_OK + b"X: " + b"a" * 200_000 + b"\r\n\r\n{}", _CLOSED),
    "50,000 headers": (_OK + b"X: a\r\n" * 50_000 + b"\r\n{}", _CLOSED),
    "headers cut off": (_OK + b"Content-Le", _CLOSED),
    "a body shorter than told": (_OK + b"Content-Length: 100\r\n\r\n{}", _CLOSED),
    "a length that is none": (_OK + b"Content-Length: many\r\n\r\n{}", _CLOSED),
    "a negative length": (_OK + b"Content-Length: -5\r\n\r\n{}", _CLOSED),
    "two lengths": (_OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", _CLOSED),
    "chunks that are none": (_OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}", _CLOSED),
    "chunks cut off": (_OK + b"Transfer-Encoding: chunked\r\n\r\n100\r\n{}", _CLOSED),
    "an unknown encoding of transfer": (_OK + b"Transfer-Encoding: magic\r\n\r\n{}", _NONE),
    "gzip": (_whole(gzip.compress(b"{}"), _OK + b"Content-Encoding: gzip\r\n"), "a compressed answer"),
    "a bomb": (_whole(gzip.compress(b" " * 2**24), _OK + b"Content-Encoding: gzip\r\n"), "a compressed"),
    "deflate": (_whole(b"x", _OK + b"Content-Encoding: deflate\r\n"), "a compressed answer"),
    "brotli": (_whole(b"x", _OK + b"Content-Encoding: br\r\n"), "a compressed answer"),
    "an unknown coding": (_whole(b"x", _OK + b"Content-Encoding: \x1b[2J\r\n"), _NONE),
    "an empty body": (_whole(b""), "talks nonsense"),
    "no JSON": (_whole(b"hello"), "not valid JSON"),
    "HTML": (_whole(b"<html><title>502</title></html>"), "not valid JSON"),
    "JSON cut off": (_whole(b'{"choices": [{"text": "'), "not valid JSON"),
    "two answers": (_whole(b"{}{}"), "not valid JSON"),
    "a stream of events": (_whole(b'data: {"choices": []}\n\ndata: [DONE]\n'), "not valid JSON"),
    "UTF-16": (_whole('{"a": 1}'.encode("utf-16")), "not UTF-8"),
    "no UTF-8": (_whole(b"\xff\xfe"), "not UTF-8"),
    "200,000 brackets": (_whole(b"[" * 200_000), "nested too deeply"),
    "5,000 digits": (_whole(b'{"a": ' + b"9" * 5000 + b"}"), "thousands of digits"),
    "6 MiB": (_whole(b" " * 6 * 2**20), "more than 4 MiB to a request for less"),
    "6 MiB in chunks": (
        _OK + b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b" " * 2**16 + b"\r\n") * 100,
        "more than 4 MiB to a request for less",
    ),
    "status 204": (b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n", "talks nonsense"),
    "a redirect": (b"HTTP/1.1 302 F\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", _NONE),
    "a redirect to a file": (
        b"HTTP/1.1 301 M\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n", _NONE
    ),
    "status 400": (_whole(b'{"error": 5}', b"HTTP/1.1 400 B\r\n"), "status 400"),
    "status 401": (_whole(b"\x1b[2J who are you", b"HTTP/1.1 401 U\r\n"), "status 401"),
    "status 404": (_whole(b'{"detail": [[[]]]}', b"HTTP/1.1 404 N\r\n"), "status 404"),
    "status 418 with 100,000 brackets": (_whole(b"[" * 100_000, b"HTTP/1.1 418 T\r\n"), "status 418"),
    "status 429": (_whole(b"slow down", b"HTTP/1.1 429 T\r\n"), "no answer .*status 429"),
    "status 500": (_whole(b"Internal Server Error", b"HTTP/1.1 500 I\r\n"), "no answer .*status 500"),
    "status 503": (_whole(b"\xff", b"HTTP/1.1 503 U\r\n"), "no answer .*status 503"),
    "an upgrade": (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", _NONE),
}  # fmt: skip
"""Name → bytes, after which the connection closes; words of the sentence."""

"""Which response commits, what completes it, and what cannot be sent."""

import http
import math
from typing import Any

import pytest

from repom.errors import InvalidResponseError
from repom.middleware import commits_on_2xx, commits_on_success
from repom.middleware.policy import (
    Label,
    body_bytes,
    check_length,
    check_start,
    completes_body,
    content_length,
    has_no_body,
)
from tests.support.asgi import Message

BODY = "http.response.body"
ZERO_COPY = "http.response.zerocopysend"
TRAILERS = "http.response.trailers"


@pytest.mark.parametrize(
    ("status", "on_success", "on_2xx"),
    [
        (199, False, False),
        (200, True, True),
        (299, True, True),
        (300, True, False),
        (399, True, False),
        (400, False, False),
        (500, False, False),
        (599, False, False),
    ],
)
def test_which_status_commits(status: int, on_success: bool, on_2xx: bool) -> None:
    """2xx and 3xx commit by the default rule, 2xx alone by `commits_on_2xx`."""
    assert commits_on_success(status, {}) is on_success
    assert commits_on_2xx(status, {}) is on_2xx


@pytest.mark.parametrize(
    ("headers", "length"),
    [
        ([], None),
        ([(b"content-type", b"text/plain"), (b"content-length", b"12")], 12),
        ([(b"Content-Length", b"12")], 12),
        ([(b"content-length", b"0")], 0),
        ([(b"content-length", b"-1")], None),
        ([(b"content-length", b"twelve")], None),
        ([(b"content-length", b" 12 ")], 12),
        ([(b"content-length", b"12"), (b"content-length", b"9")], 9),
        ([(b"content-length", b"12"), (b"Transfer-Encoding", b"chunked")], None),
        ([(b"x-content-length", b"12")], None),
    ],
)
def test_announced_length(headers: list[tuple[bytes, bytes]], length: int | None) -> None:
    """Content-Length in any case; one that is no number announces nothing, of several the
    smallest counts, and with Transfer-Encoding none does."""
    assert content_length(headers) == length


@pytest.mark.parametrize(
    ("message", "sent", "announced", "completes"),
    [
        ({"type": BODY}, 0, None, True),
        ({"type": BODY, "more_body": False}, 0, None, True),
        ({"type": BODY, "more_body": True}, 5, None, False),
        ({"type": BODY, "more_body": True}, 4, 5, False),
        ({"type": BODY, "more_body": True}, 5, 5, True),
        ({"type": BODY, "more_body": True}, 6, 5, True),
        ({"type": BODY, "more_body": True}, 0, 0, True),
        ({"type": ZERO_COPY}, 0, None, True),
        ({"type": ZERO_COPY, "more_body": True}, 5, None, False),
        ({"type": ZERO_COPY, "more_body": True}, 5, 5, True),
        ({"type": ZERO_COPY, "more_body": True}, math.inf, 5, True),
        ({"type": ZERO_COPY, "more_body": True}, math.inf, None, False),
        ({"type": "http.response.pathsend"}, 0, 5, True),
        ({"type": TRAILERS}, 0, None, True),
        ({"type": TRAILERS, "more_trailers": True}, 0, None, False),
        ({"type": "http.response.push"}, 0, None, False),
        ({"type": "http.response.early_hint"}, 0, None, False),
    ],
)
def test_what_completes_a_response(
    message: Message, sent: float, announced: int | None, completes: bool
) -> None:
    """The last chunk, the one that reaches Content-Length, a whole file, the last trailers."""
    assert completes_body(message, sent, announced) is completes


@pytest.mark.parametrize(
    ("message", "count"),
    [
        ({"type": BODY, "body": b"12345"}, 5),
        ({"type": BODY}, 0),
        ({"type": BODY, "body": None}, 0),
        ({"type": BODY, "body": bytearray(b"12")}, 2),
        ({"type": BODY, "body": memoryview(b"12345678").cast("I")}, 8),
        ({"type": TRAILERS, "headers": []}, 0),
        ({"type": ZERO_COPY, "file": 0, "count": 7}, 7),
        ({"type": ZERO_COPY, "file": 0, "count": 0}, 0),
        ({"type": ZERO_COPY, "file": 0}, math.inf),
        ({"type": ZERO_COPY, "file": 0, "count": None}, math.inf),
    ],
)
def test_how_much_of_the_body_a_message_sends(message: Message, count: float) -> None:
    """What may be the rest of a file counts as all that there can be."""
    assert body_bytes(message) == count


@pytest.mark.parametrize("body", ["text", 3, ["x"]])
def test_body_that_is_no_bytes(body: Any) -> None:
    """It is refused here: some servers send something else for it."""
    with pytest.raises(TypeError):
        body_bytes({"type": BODY, "body": body})


LENGTH = (b"content-length", b"3")


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (200, []),
        (http.HTTPStatus.CREATED, [(b"x-a", b"1"), LENGTH]),
        (200, [[b"X-A", b""], (bytearray(b"x"), bytearray(b"1"))]),
        (200, [(b"x-a", b"\xe9 \t|"), (b"!#$%&'*+.^_`|~", b"1")]),
        (200, [LENGTH, LENGTH]),
        (204, [(b"content-length", b" 0 ")]),
    ],
)
def test_start_that_can_be_sent(status: int, headers: Any) -> None:
    """What servers send without a word is none of our business."""
    check_start(status, headers)


@pytest.mark.parametrize(
    ("status", "headers", "says"),
    [
        ("200", [], "status is '200'"),
        (200.0, [], "status is 200.0"),
        (200, [(b"x-a", b"1\r\nx-b: 2")], "header b'x-a'"),
        (200, [(b"x-a", b"\0")], "header b'x-a'"),
        (200, [(b"x a", b"1")], "header b'x a'"),
        (200, [(b"x-a:", b"1")], "header b'x-a:'"),
        (200, [(b"", b"1")], "header b''"),
        (200, [("x-a", "1")], "header 'x-a'"),
        (200, [(b"x-a", 1)], "header b'x-a'"),
        (200, [(b"x-a", b"1", b"2")], "header b'x-a'"),
        (200, [b"x-a"], "header b'x-a'"),
        (200, [None], "header None"),
        (200, [(b"content-length", b"three")], "Content-Length is"),
        (200, [(b"content-length", b"+3")], "Content-Length is"),
        (200, [(b"content-length", b"3, 3")], "Content-Length is"),
        (200, [LENGTH, (b"Content-Length", b"4")], r"Content-Length is \[b'3', b'4'\]"),
    ],
)
def test_start_that_cannot_be_sent(status: Any, headers: Any, says: str) -> None:
    """What a server would refuse, after COMMIT."""
    with pytest.raises(InvalidResponseError, match=says):
        check_start(status, headers)


def test_value_of_a_header_stays_out_of_the_error() -> None:
    """A cookie may be in it."""
    with pytest.raises(InvalidResponseError) as caught:
        check_start(200, [(b"set-cookie", b"session=secret\n")])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "sent", "announced", "valid"),
    [
        ({"type": BODY}, 3, 3, True),
        ({"type": BODY}, 2, 3, False),
        ({"type": BODY}, 4, 3, False),
        ({"type": BODY}, 4, None, True),
        ({"type": BODY, "more_body": True}, 2, 3, True),
        ({"type": BODY, "more_body": True}, 3, 3, True),
        ({"type": BODY, "more_body": True}, 4, 3, False),
        ({"type": ZERO_COPY}, 2, 3, False),
        ({"type": ZERO_COPY}, math.inf, 3, True),
        ({"type": "http.response.pathsend"}, 0, 3, True),
        ({"type": TRAILERS}, 0, 3, True),
    ],
)
def test_length_of_the_body(
    message: Message, sent: float, announced: int | None, valid: bool
) -> None:
    """Neither more than Content-Length, nor at the end less; of a file only the server knows."""
    if valid:
        check_length(message, sent, announced)
    else:
        with pytest.raises(InvalidResponseError, match=f"{sent} bytes, .* Content-Length is 3"):
            check_length(message, sent, announced)


@pytest.mark.parametrize(
    ("status", "length", "empty"),
    [
        (200, None, False),
        (200, b"1", False),
        (201, b"0", True),
        (204, None, True),
        (304, b"9", True),
    ],
)
def test_response_without_a_body(status: int, length: bytes | None, empty: bool) -> None:
    """204, 304 and Content-Length 0 are complete when they start."""
    assert has_no_body(status, [(b"content-length", length)] if length else []) is empty


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/articles", "GET /articles"),
        ("/a b/ä;x=1", "GET /a%20b/%C3%A4;x=1"),
        ("/x\nERROR forged", "GET /x%0AERROR%20forged"),
    ],
    ids=["plain", "as it was sent", "one line"],
)
def test_label_for_logs(path: str, text: str) -> None:
    """A request in logs is its method and path, always in one line."""
    assert str(Label("GET", path)) == text

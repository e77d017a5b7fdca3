"""The rules of an HTTP response: each that is broken is seen, and what is allowed passes."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.asgi import (
    ASGIApp,
    Message,
    ProtocolViolation,
    Receive,
    Scope,
    Send,
    request,
)

START: Message = {"type": "http.response.start", "status": 200}
END: Message = {"type": "http.response.body"}
MORE: Message = {"type": "http.response.body", "body": b"x", "more_body": True}


def start(**keys: Any) -> Message:
    return {**START, **keys}


def body(**keys: Any) -> Message:
    return {**END, **keys}


def part(name: str, **keys: Any) -> Message:
    return {"type": f"http.response.{name}", **keys}


def sending(*messages: Message, swallow: bool = False) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            try:
                await send(message)
            except ProtocolViolation:
                if not swallow:
                    raise

    return app


VIOLATIONS: dict[str, tuple[list[Message], str]] = {
    "body-first": ([END], "before the response was started"),
    "second-start": ([START, START], "start sent after the response was started"),
    "start-after-end": ([START, END, START], "after the response was complete"),
    "body-after-end": ([START, END, END], "body sent after the response was complete"),
    "no-type": ([{}], "None is no message"),
    "unknown-type": ([{"type": "http.response.boby"}], "no message of an HTTP response"),
    "no-status": ([{"type": "http.response.start"}], "has no 'status'"),
    "status-text": ([start(status="200")], "must be int, not '200'"),
    "status-bool": ([start(status=True)], "must be int, not True"),
    "status-low": ([start(status=99)], "not in 100..599"),
    "status-high": ([start(status=600)], "not in 100..599"),
    "header-str": ([start(headers=[("a", "b")])], "pair of bytes"),
    "header-triple": ([start(headers=[(b"a", b"b", b"c")])], "no pair"),
    "header-none": ([start(headers=[None])], "no pair"),
    "header-upper": ([start(headers=[(b"Content-Type", b"a")])], "lower-case"),
    "header-pseudo": ([start(headers=[(b":status", b"200")])], "lower-case"),
    "header-split": ([start(headers=[(b"a", b"b\r\nc: d")])], "line break"),
    "body-str": ([START, body(body="x")], "must be bytes, not 'x'"),
    "more-body-int": ([START, body(more_body=1)], "must be bool, not 1"),
    "length-short": ([start(headers=[(b"content-length", b"2")]), END], "is 2, .* has 0"),
    "length-long": ([start(headers=[(b"content-length", b"0")]), MORE], "is 0, .* has 1"),
    "length-text": ([start(headers=[(b"content-length", b"two")])], "must be one number"),
    "length-twice": ([start(headers=[(b"content-length", b"0")] * 2)], "must be one number"),
    "204-with-body": ([start(status=204), body(body=b"x")], "have no body: 204"),
    "304-with-body": ([start(status=304), body(body=b"x")], "have no body: 304"),
    "trailers-announced-not-offered": ([start(trailers=True)], "does not offer"),
    **{
        f"{name}-not-offered": ([START, part(name)], "does not offer that extension")
        for name in ["trailers", "pathsend", "zerocopysend", "early_hint", "push", "debug"]
    },
}
OFFERED = [part(name)["type"] for name in ["trailers", "pathsend", "early_hint", "push", "debug"]]
VIOLATIONS_WITH_EXTENSIONS: dict[str, tuple[list[Message], str]] = {
    "trailers-not-announced": ([START, END, part("trailers")], "after the response was complete"),
    "trailers-before-end": (
        [start(trailers=True), MORE, part("trailers")],
        "trailers sent after the response was started",
    ),
    "body-before-trailers": ([start(trailers=True), END, END], "after the body was complete"),
    "pathsend-mixed": ([START, MORE, part("pathsend", path="/x")], "cannot be mixed"),
    "pathsend-relative": ([START, part("pathsend", path="x")], "no absolute path"),
    "debug-late": ([START, part("debug", info={})], "debug sent after"),
    "debug-twice": ([part("debug", info={})] * 2, "sent twice"),
    "push-early": ([part("push", path="/x")], "push sent before"),
    "hint-str": ([part("early_hint", links=["a"])], "must be bytes"),
}


@pytest.mark.parametrize("swallow", [False, True], ids=["raised", "swallowed"])
@pytest.mark.parametrize(("messages", "says"), VIOLATIONS.values(), ids=VIOLATIONS)
async def test_violation(messages: list[Message], says: str, swallow: bool) -> None:
    """Each broken rule fails the test, also when the application swallows the error."""
    with pytest.raises(ProtocolViolation, match=says):
        await request(sending(*messages, swallow=swallow))


@pytest.mark.parametrize(
    ("messages", "says"),
    VIOLATIONS_WITH_EXTENSIONS.values(),
    ids=VIOLATIONS_WITH_EXTENSIONS,
)
async def test_violation_of_an_extension(messages: list[Message], says: str) -> None:
    """An extension that is offered has rules, too."""
    with pytest.raises(ProtocolViolation, match=says):
        await request(sending(*messages), extensions=OFFERED)


async def test_head() -> None:
    """The response to HEAD has no body; one can be discarded instead, as uvicorn does."""
    app = sending(start(headers=[(b"content-length", b"1")]), body(body=b"x"))
    with pytest.raises(ProtocolViolation, match="have no body: HEAD"):
        await request(app, "HEAD")
    response = await request(app, "HEAD", drop_head_body=True)
    assert (response.complete, response.body) == (True, b"")


async def test_extensions_in_use(tmp_path: Path) -> None:
    """Trailers, files by path and by descriptor reach the client as part of the response."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with path.open("rb") as file:
        response = await request(
            sending(
                part("debug", info={}),
                part("early_hint", links=[b"</a>"]),
                start(trailers=True, headers=[(b"content-length", b"11")]),
                part("push", path="/a"),
                MORE,
                part("zerocopysend", file=file, count=4, more_body=True),
                part("zerocopysend", file=file, offset=4),
                part("trailers", more_trailers=True),
                part("trailers", headers=[(b"x-sum", b"1")]),
            ),
            extensions=[*OFFERED, "http.response.zerocopysend"],
        )
    assert (response.body, response.complete) == (b"x0123456789", True)
    response = await request(
        sending(START, part("pathsend", path=str(path))), extensions=["http.response.pathsend"]
    )
    assert (response.body, response.complete) == (b"0123456789", True)

"""What is made of a reader's answers, and of its silence: no server is asked here."""

import logging

import pytest

from repom import Database
from repom.reader import CHECK_EVERY, RETRY_AFTER, Lag, Reader

NOW = 1000.0


@pytest.fixture
def reader() -> Reader:
    """One that has not been asked yet."""
    return Reader(Database("postgresql://u:secret@replica/db"))


def test_a_new_one(reader: Reader) -> None:
    """It has to be asked before anybody reads from it."""
    assert reader.is_due(NOW)
    assert not reader.is_usable(NOW)


def test_one_that_has_everything(reader: Reader) -> None:
    """It is read from, for as long as the answer is believed; it is asked again before."""
    reader.answered(NOW, 10, 10)
    assert reader.is_usable(NOW)
    assert not reader.is_due(NOW + CHECK_EVERY / 2)
    assert reader.is_due(NOW + CHECK_EVERY)
    assert reader.is_usable(NOW + CHECK_EVERY)
    assert not reader.is_usable(NOW + 3 * CHECK_EVERY)


def test_one_that_somebody_asks(reader: Reader) -> None:
    """One at a time."""
    reader.is_being_asked = True
    assert not reader.is_due(NOW)


def test_one_that_is_too_far_behind(reader: Reader, caplog: pytest.LogCaptureFixture) -> None:
    """It is left out, asked again soon, and read from when it has caught up."""
    with caplog.at_level(logging.INFO, "repom"):
        reader.answered(NOW, 10, 10)
        reader.answered(NOW, 10, 30)
        assert not reader.is_usable(NOW)
        assert reader.is_due(NOW + CHECK_EVERY)
        reader.answered(NOW, 10, 31)
        reader.answered(NOW, 32, 31)
        assert reader.is_usable(NOW)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO"]
    assert "20 bytes of the writer's log behind" in caplog.messages[1]


def test_one_that_does_not_answer(reader: Reader, caplog: pytest.LogCaptureFixture) -> None:
    """It is left alone for a while; the log says so once, without the password."""
    reader.failed(NOW, ConnectionRefusedError("no"))
    assert not reader.is_due(NOW + RETRY_AFTER / 2)
    assert reader.is_due(NOW + RETRY_AFTER)
    reader.failed(NOW, ConnectionRefusedError("no"))
    (message,) = caplog.messages
    assert "until it recovers: ConnectionRefusedError: no" in message
    assert "secret" not in message + repr(reader)


@pytest.mark.parametrize(
    ("asked", "now", "required"),
    [
        ([], 100.0, 0),
        ([(100.0, 5)], 100.0, 5),  # nothing older is known
        ([(89.0, 4), (95.0, 5), (100.0, 6)], 100.0, 4),
        ([(10.0, 1), (100.0, 6)], 100.0, 6),  # what is too old says nothing
        ([(10.0, 1)], 100.0, 1),  # but while the writer does not answer, it is all there is
    ],
)
def test_how_far_a_reader_may_be_behind(
    asked: list[tuple[float, int]], now: float, required: int
) -> None:
    """It has what the writer had ten seconds ago, or what is known instead."""
    lag = Lag(10.0)
    for when, position in asked:
        lag.note(when, position)
    assert lag.required(now) == required

"""Counting attempts, and the pauses between them."""

import logging

import pytest

from repom.errors import CommitOutcomeUnknown, PartialCommitError
from repom.retry import LONGEST_PAUSE, Attempts, pause_before


class LostError(Exception):
    pass


def is_lost(error: BaseException) -> bool:
    return isinstance(error, LostError)


def test_pauses_grow_and_are_not_the_same_for_all() -> None:
    longest = {attempt: max(pause_before(attempt) for _ in range(200)) for attempt in (2, 5, 50)}
    assert longest[2] <= 0.01 < longest[5] <= 0.08
    assert 0.8 < longest[50] <= LONGEST_PAUSE
    assert len({pause_before(9) for _ in range(50)}) > 40


def test_attempts_are_counted_and_end() -> None:
    """What is raised in the end says how often it was tried."""
    attempts = Attempts(2, is_lost)
    assert attempts.number == 1
    assert attempts.pause_after(LostError()) is not None
    assert attempts.number == 2
    assert not attempts.is_last
    assert attempts.pause_after(LostError()) is not None
    assert attempts.number == 3
    assert attempts.is_last
    last = LostError()
    assert attempts.pause_after(last) is None
    assert last.__notes__ == ["It was attempt 3, the last one."]


def test_other_errors_end_it_at_once() -> None:
    attempts = Attempts(2, is_lost)
    error = ValueError()
    assert attempts.pause_after(error) is None
    assert (attempts.number, hasattr(error, "__notes__")) == (1, False)


@pytest.mark.parametrize(
    "error",
    [
        CommitOutcomeUnknown("unknown"),
        PartialCommitError("half", committed=["a"], failed="b", rolled_back=[]),
    ],
    ids=repr,
)
def test_what_may_have_been_committed_is_never_repeated(error: Exception) -> None:
    """Whatever `retry_on` says of it."""
    attempts = Attempts(2, lambda error: True)
    assert attempts.pause_after(error) is None
    assert attempts.number == 1


def test_without_retries_the_error_is_left_alone() -> None:
    error = LostError()
    assert Attempts(0, is_lost).pause_after(error) is None
    assert not hasattr(error, "__notes__")


def test_each_repetition_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "repom")
    Attempts(1, is_lost, label="POST /a").pause_after(LostError())
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage().startswith("POST /a lost a conflict (LostError); attempt 2 follows")


def test_less_than_never_is_refused() -> None:
    with pytest.raises(ValueError, match="retries=-1: write how often"):
        Attempts(-1)

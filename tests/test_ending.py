"""How the transactions of a scope end: the rules, without any IO."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from repom.ending import Step, Steps, close_steps, commit_steps, rollback_steps
from repom.errors import CommitOutcomeUnknown, PartialCommitError


@dataclass(frozen=True)
class Party:
    name: str
    has_changes: bool = True


A, B, C = Party("a"), Party("b"), Party("c")


class RefusedError(Exception):
    pass


def run(
    steps: Steps, failures: dict[str, BaseException] | None = None
) -> tuple[str, BaseException | None]:
    """Do the steps, of which those named in `failures` fail; what was done, and what was raised."""
    failures, done = failures or {}, []
    try:
        step = next(steps)
        while True:
            name = _name(step)
            done.append(name)
            step = steps.throw(failures[name]) if name in failures else next(steps)
    except StopIteration:
        return " ".join(done), None
    except BaseException as error:
        return " ".join(done), error


def _name(step: Step) -> str:
    return f"{step.action}:{step.party.name}"


REFUSED = RefusedError()
UNKNOWN = CommitOutcomeUnknown("lost")


def test_what_has_not_changed_is_not_flushed() -> None:
    """It would cost a greenlet, or a thread."""
    parties = [Party("a", has_changes=False), B]
    assert run(commit_steps(parties)) == ("flush:b commit:a commit:b", None)


@pytest.mark.parametrize(
    ("parties", "failing", "expected"),
    [
        ([], "", ""),
        ([A], "", "flush:a commit:a"),
        ([A, B], "", "flush:a flush:b commit:a commit:b"),
        ([A], "flush:a", "flush:a rollback:a"),
        ([A], "commit:a", "flush:a commit:a rollback:a"),
        ([A, B], "flush:a", "flush:a rollback:a rollback:b"),
        ([A, B], "flush:b", "flush:a flush:b rollback:a rollback:b"),
        ([A, B], "commit:a", "flush:a flush:b commit:a rollback:a rollback:b"),
        (
            [A, B, C],
            "commit:b",
            "flush:a flush:b flush:c commit:a commit:b rollback:b rollback:c",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_commit(parties: Sequence[Party], failing: str, expected: str) -> None:
    """All flush before any commits; a failure rolls back all that is not committed."""
    done, error = run(commit_steps(parties), {failing: REFUSED})
    assert done == expected
    assert (error is None) == (not failing)


@pytest.mark.parametrize("failing", ["flush:a", "flush:b", "commit:a"])
def test_failure_before_anything_is_committed_is_raised_as_it_is(failing: str) -> None:
    assert run(commit_steps([A, B]), {failing: REFUSED})[1] is REFUSED


def test_failure_after_a_commit_says_which_databases_are_committed() -> None:
    _, error = run(commit_steps([A, B, C]), {"commit:b": REFUSED})
    assert isinstance(error, PartialCommitError)
    assert error.__cause__ is REFUSED
    assert (error.committed, error.failed, error.rolled_back) == (["a"], "b", ["c"])
    assert str(error).startswith(
        "committed on a, but not on b: its COMMIT failed; rolled back on c.\n"
    )


def test_unknown_outcome_after_a_commit_is_not_called_a_failure() -> None:
    _, error = run(commit_steps([A, B]), {"commit:b": UNKNOWN})
    assert isinstance(error, PartialCommitError)
    assert error.__cause__ is UNKNOWN
    assert "whether its COMMIT succeeded is not known.\n" in str(error)


def test_interrupt_after_a_commit_stays_an_interrupt() -> None:
    """Ctrl-C must not become an error that an application catches."""
    interrupt = KeyboardInterrupt()
    done, error = run(commit_steps([A, B]), {"commit:b": interrupt})
    assert done.endswith("commit:b rollback:b")
    assert error is interrupt
    assert "committed on a, but not on b" in interrupt.__notes__[0]


def test_rollback_goes_on_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    """The database undoes what has lost its connection; the others must still be rolled back."""
    with caplog.at_level(logging.WARNING):
        assert run(rollback_steps([A, B]), {"rollback:a": REFUSED}) == (
            "rollback:a rollback:b",
            None,
        )
    assert [record.exc_info and record.exc_info[1] for record in caplog.records] == [REFUSED]
    assert "'a'" in caplog.text


def test_failed_commit_is_raised_though_its_rollback_fails_too() -> None:
    done, error = run(commit_steps([A, B]), {"commit:a": REFUSED, "rollback:a": ValueError()})
    assert done == "flush:a flush:b commit:a rollback:a rollback:b"
    assert error is REFUSED


def test_close_goes_on_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert run(close_steps([A, B]), {"close:a": REFUSED}) == ("close:a close:b", None)
    assert "'a'" in caplog.text


def test_nothing_more_is_asked_for_when_the_loop_is_gone() -> None:
    """A coroutine that is thrown away cannot await a rollback."""
    steps = commit_steps([A])
    next(steps)
    steps.close()  # raises if another step is yielded

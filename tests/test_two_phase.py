"""How a unit of work ends by a two-phase commit: the rules, without any IO.

The second half plays every failure and every crash at every step, on up to four databases, and
has recovery end what is left: whatever happens, all have committed or none, as the client was told.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import pytest
from sqlalchemy.exc import DBAPIError

from repom.ending import Party as AnyParty
from repom.ending import Step, Steps
from repom.errors import CommitOutcomeUnknown, CommitPendingError, TransactionAbortedError
from repom.in_doubt import InDoubt, in_order, verdict
from repom.two_phase import two_phase_steps

P = TypeVar("P", bound=AnyParty)

REFUSED = DBAPIError("", {}, Exception("refused"))
LOST = DBAPIError("", {}, Exception("lost"), connection_invalidated=True)


@dataclass(eq=False)
class Party:
    name: str
    has_changes: bool = True


@dataclass
class Branches:
    """Which of the parties take part, by their names; or an error instead."""

    taking_part: str
    error: Exception | None = None
    unit: str = "u1"

    def order(self, parties: Sequence[P]) -> list[P]:
        if self.error is not None:
            raise self.error
        return [party for name in self.taking_part for party in parties if party.name == name]


def run(
    names: str,
    failures: dict[str, BaseException] | None = None,
    *,
    branches: Branches | None = None,
) -> tuple[str, BaseException | None]:
    """Do the steps, of which those named in `failures` fail; what was done, and what was raised."""
    failures, done = failures or {}, []
    steps = two_phase_steps([Party(name) for name in names], branches or Branches(names))
    try:
        step = next(steps)
        while True:
            name = f"{step.action}:{step.party.name}"
            done.append(name)
            step = steps.throw(failures[name]) if name in failures else next(steps)
    except StopIteration:
        return " ".join(done), None
    except BaseException as error:
        return " ".join(done), error


@pytest.mark.parametrize(
    ("names", "failures", "expected"),
    [
        ("", {}, ""),
        # One database needs no second phase.
        ("a", {}, "flush:a flush:a commit:a"),
        ("ab", {}, "flush:a flush:b prepare:a prepare:b commit:a commit:b"),
        ("ab", {"flush:b": REFUSED}, "flush:a flush:b rollback:a rollback:b"),
        ("ab", {"prepare:a": REFUSED}, "flush:a flush:b prepare:a rollback:b rollback:a"),
        (
            "abc",
            {"prepare:b": REFUSED},
            "flush:a flush:b flush:c prepare:a prepare:b rollback:c rollback:b rollback:a",
        ),
        # It may be prepared: the first is left prepared, which says that nothing is committed.
        (
            "abc",
            {"prepare:b": LOST},
            "flush:a flush:b flush:c prepare:a prepare:b rollback:c rollback:b invalidate:a",
        ),
        (
            "abc",
            {"prepare:c": REFUSED, "rollback:b": LOST},
            "flush:a flush:b flush:c prepare:a prepare:b prepare:c rollback:c rollback:b"
            " invalidate:a",
        ),
        (
            "abc",
            {"prepare:b": REFUSED, "rollback:c": LOST},  # which was not prepared
            "flush:a flush:b flush:c prepare:a prepare:b rollback:c rollback:b rollback:a",
        ),
        (
            "abc",
            {"commit:a": LOST},
            "flush:a flush:b flush:c prepare:a prepare:b prepare:c commit:a"
            " invalidate:a invalidate:b invalidate:c",
        ),
        (
            "abc",
            {"commit:b": LOST},
            "flush:a flush:b flush:c prepare:a prepare:b prepare:c commit:a commit:b commit:c"
            " invalidate:b",
        ),
        (
            "ab",
            {"commit:b": LOST, "invalidate:b": REFUSED},
            "flush:a flush:b prepare:a prepare:b commit:a commit:b invalidate:b",
        ),
    ],
)
def test_steps(names: str, failures: dict[str, BaseException], expected: str) -> None:
    done, error = run(names, failures)
    assert done == expected
    assert (error is None) == (not failures)


def test_the_order_is_that_of_the_branches() -> None:
    """And a database that was asked nothing has nothing to prepare."""
    done, _ = run("abc", branches=Branches("ca"))
    assert done == (
        "flush:a flush:b flush:c prepare:c prepare:a commit:c commit:a flush:b commit:b"
    )


def test_a_refused_order_rolls_all_back() -> None:
    refused = ValueError()
    done, error = run("ab", branches=Branches("ab", refused))
    assert done == "flush:a flush:b rollback:a rollback:b"
    assert error is refused


def test_a_failed_prepare_is_raised_as_it_is() -> None:
    assert run("ab", {"prepare:b": REFUSED})[1] is REFUSED


def test_an_aborted_transaction_is_certainly_not_prepared() -> None:
    done, _ = run("ab", {"prepare:b": TransactionAbortedError()})
    assert done.endswith("rollback:b rollback:a")


def test_what_may_be_left_prepared_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    run("ab", {"prepare:b": LOST})
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "u1 was not committed" in record.message
    assert "python -m repom.recovery" in record.message


def test_unknown_decision() -> None:
    """Whether the first COMMIT has happened decides, and nobody knows it."""
    _, error = run("ab", {"commit:a": LOST})
    assert isinstance(error, CommitOutcomeUnknown)
    assert error.__cause__ is LOST
    assert "u1 is prepared on a, b" in str(error)
    assert str(error).count("\n") <= 2


def test_pending() -> None:
    """It is decided; who has confirmed and who has not is said."""
    _, error = run("abcd", {"commit:b": LOST, "commit:d": REFUSED})
    assert isinstance(error, CommitPendingError)
    assert error.__cause__ is LOST
    assert (error.committed, error.pending, error.unit) == (["a", "c"], ["b", "d"], "u1")
    assert str(error).count("\n") <= 2


def test_an_interrupt_stays_an_interrupt() -> None:
    """And leaves nothing to be rolled back by whoever closes the sessions."""
    interrupt = KeyboardInterrupt()
    done, error = run("abc", {"commit:b": interrupt})
    assert done.endswith("commit:a commit:b invalidate:b invalidate:c")
    assert error is interrupt


def test_nothing_more_is_asked_for_when_the_loop_is_gone() -> None:
    """A coroutine that is thrown away cannot await another step."""
    for steps_before in range(6):
        steps = two_phase_steps([Party("a"), Party("b")], Branches("ab"))
        for _ in range(steps_before + 1):
            next(steps)
        steps.close()  # raises if another step is yielded


# --- every failure, every crash -------------------------------------------------------------------

State = Literal["open", "prepared", "committed", "gone"]
#: What becomes of a step: done; refused; the connection is lost before, or after it was done; or
#: the process dies before, or after it was done.
Fate = Literal["done", "refused", "lost", "done and lost", "crash", "done and crash"]

FATES: dict[str, tuple[Fate, ...]] = {
    "flush": ("done", "refused", "crash"),
    "prepare": ("done", "refused", "lost", "done and lost", "crash", "done and crash"),
    "commit": ("done", "refused", "lost", "done and lost", "crash", "done and crash"),
    "rollback": ("done", "refused", "lost", "done and lost", "crash", "done and crash"),
    "invalidate": ("done", "crash"),
}


#: In one story. More of them do not meet each other, and take long to be told.
MOST_FAULTS = 4


class CrashError(BaseException):
    pass


@dataclass(eq=False)
class Server:
    """A party, and the server that keeps its transaction."""

    name: str
    state: State = "open"
    is_connected: bool = True
    has_session: bool = True
    has_changes: bool = True

    def do(self, action: str, fate: Fate) -> None:
        """The step, as far as its fate lets it happen.

        Raises:
            DBAPIError: as the driver would.
            CrashError: the process has died.
        """
        if action == "rollback" and not self.is_connected:
            return  # SQLAlchemy asks no connection that it knows to be lost
        if fate.startswith("done"):
            self._happens(action)
        if "crash" in fate:
            raise CrashError
        if "lost" in fate:
            self.disconnect()
        if action in ("commit", "rollback", "invalidate") and fate == "done":
            self.has_session = False
        if action == "prepare" and fate != "done":
            self.has_session = False  # SQLAlchemy rolls the session back
        if fate == "refused":
            if action == "prepare" or (action == "commit" and self.state == "open"):
                self.state = "gone"
            raise REFUSED
        if "lost" in fate:
            raise LOST

    def disconnect(self) -> None:
        self.is_connected = False
        if self.state == "open":
            self.state = "gone"

    def _happens(self, action: str) -> None:
        if action == "prepare":
            self.state = "prepared"
        elif action == "commit":
            self.state = "committed"
        elif action == "rollback":
            self.state = "gone"
        elif action == "invalidate":
            self.disconnect()

    def close_session(self) -> None:
        """What the owner does at the end with a session that is not closed: it is rolled back."""
        if self.has_session and self.is_connected and self.state != "committed":
            self.state = "gone"
        self.disconnect()


@dataclass
class Story:
    """One way in which an end can go: the fates of its steps, chosen one after the other."""

    chosen: list[int]
    alternatives: list[int] = field(default_factory=list)

    def choose(self, fates: Sequence[Fate]) -> Fate:
        number = len(self.alternatives)
        if sum(map(bool, self.chosen[:number])) == MOST_FAULTS:
            fates = fates[:1]
        self.alternatives.append(len(fates))
        if number == len(self.chosen):
            self.chosen.append(0)
        return fates[self.chosen[number]]

    def next(self) -> "Story | None":
        """The next story, in an order that comes to an end."""
        chosen = self.chosen[: len(self.alternatives)]
        while chosen and chosen[-1] + 1 == self.alternatives[len(chosen) - 1]:
            chosen.pop()
        return Story([*chosen[:-1], chosen[-1] + 1]) if chosen else None


def stories() -> Iterator[Story]:
    story: Story | None = Story([])
    while story is not None:
        yield story
        story = story.next()


def end(servers: list[Server], story: Story) -> BaseException | None:
    """Play the end of a unit of work on these servers; return what was raised."""
    steps: Steps = two_phase_steps(servers, Branches("".join(server.name for server in servers)))
    told: BaseException | None = None
    try:
        step: Step = next(steps)
        while True:
            server = servers[[it.name for it in servers].index(step.party.name)]
            try:
                server.do(step.action, story.choose(FATES[step.action]))
            except CrashError:
                raise
            except Exception as error:
                step = steps.throw(error)
            else:
                step = next(steps)
    except StopIteration:
        pass
    except BaseException as error:
        told = error
    for server in servers:
        server.disconnect() if isinstance(told, CrashError) else server.close_session()
    return told


def recover(servers: list[Server], story: Story) -> None:
    """Let recovery end what is left, though it may die itself, or be refused, at each branch."""
    for attempt in itertools.count():
        left = {n: [it.name] for n, it in enumerate(servers) if it.state == "prepared"}
        if not left:
            return
        how = verdict(InDoubt("u1", "", left), "")
        assert how != "unknown"
        for number in in_order(left, how):
            # The second attempt succeeds, or it would never end.
            if attempt == 0 and story.choose(("done", "crash")) == "crash":
                break
            servers[number].state = "committed" if how == "commit" else "gone"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_all_or_none(count: int, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever fails, and whenever the process dies, in the end all have committed or none; and
    what the client was told is true."""
    caplog.set_level(logging.CRITICAL)  # thousands of tracebacks would take minutes
    played = 0
    for story in stories():
        servers = [Server(name) for name in "abcd"[:count]]
        told = end(servers, story)
        recover(servers, story)
        played += 1
        states = {server.state for server in servers}
        what = (story.chosen, told, [server.state for server in servers])
        assert states in ({"committed"}, {"gone"}), what
        if told is None or isinstance(told, CommitPendingError):
            assert states == {"committed"}, what
        elif not isinstance(told, (CommitOutcomeUnknown, CrashError)) and count > 1:
            assert states == {"gone"}, what
    assert played > 4**count

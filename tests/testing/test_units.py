"""Who may work on the connection of a test, and what has to be executed before: the rules.

Pure functions, so no database here; what they are good for is in `inner/units.py`.
"""

from collections.abc import Sequence
from typing import Any

import pytest

from repom.testing.units import Caller, Turn, Unit, turn_of


def unit(name: str | None = None, **attributes: Any) -> Unit:
    """One that has written, and is on the stack as `name`."""
    made = Unit("app.py:1")
    made.savepoint = name
    made.has_written = True
    for attribute, value in attributes.items():
        setattr(made, attribute, value)
    return made


NOBODY = Caller(scope=None, task=None, loop=None, thread=-1, awaits=False, units=())


def turn(me: Unit, stack: Sequence[Unit], caller: Caller = NOBODY, **kwargs: Any) -> Turn:
    """The turn of `me`, which need not wait."""
    found = turn_of(me, stack, caller, **kwargs)
    assert found is not None
    return found


def test_first_unit_begins() -> None:
    """By a savepoint of its own."""
    me = unit()
    assert turn(me, []) == Turn((me,), ("SAVEPOINT repom_0",), "repom_0", ())


def test_unit_on_top_goes_on() -> None:
    """Nothing has to be done before."""
    me = unit("repom_0")
    assert turn(me, [me]) == Turn((me,), (), None, ())


def test_unit_that_ends_begins_nothing() -> None:
    """Not even if others have taken its place on the stack."""
    assert turn(unit(), [], begins=False) == Turn((), (), None, ())


def test_others_wait_for_who_has_written() -> None:
    """The newcomer, and the outer unit that another one was begun inside of."""
    other, outer = unit("repom_0"), unit("repom_0")
    assert turn_of(unit(), [other], NOBODY) is None
    assert turn_of(outer, [outer, unit("repom_1")], NOBODY) is None


GIVES_WAY = [{"has_written": False}, {"is_of_the_test": True}]


@pytest.mark.parametrize("attributes", GIVES_WAY)
def test_who_gives_way(attributes: dict[str, bool]) -> None:
    """Who has only read, and the test's own session: what they have done stays."""
    me = unit()
    found = turn(me, [unit("repom_0", **attributes)])
    assert found.sql == ("RELEASE SAVEPOINT repom_0", "SAVEPOINT repom_0")
    assert found.stack == (me,)
    assert found.undone == ()


def test_savepoint_of_the_test_stays_open() -> None:
    """Around whatever comes; other units have theirs to themselves."""
    me = unit()
    test = unit("repom_0", is_of_the_test=True, own_savepoints=["sa_savepoint_1"])
    assert turn(me, [test]).stack == (test, me)
    assert turn(me, [test]).begins == "repom_1"
    reader = unit("repom_0", has_written=False, own_savepoints=["sa_savepoint_1"])
    assert turn_of(me, [reader], NOBODY) is None


def test_unit_that_is_over_is_undone_first() -> None:
    """With those below it that are over, too."""
    me, stays, gone, gone_too = unit(), unit("a"), unit("b", over=True), unit("c", over=True)
    found = turn(me, [stays, gone, gone_too], NOBODY._replace(units=(stays,)))
    assert found.sql == (
        "ROLLBACK TO SAVEPOINT c",
        "RELEASE SAVEPOINT c",
        "ROLLBACK TO SAVEPOINT b",
        "RELEASE SAVEPOINT b",
        "SAVEPOINT repom_0",
    )
    assert found.stack == (stays, me)
    assert found.undone == (gone_too, gone)


def test_unit_that_is_over_stays_below_one_that_is_not() -> None:
    """It is undone when that has ended."""
    inner, outer = unit("repom_1"), unit("repom_0", over=True)
    assert turn(inner, [outer, inner]) == Turn((outer, inner), (), None, ())


def test_failed_unit_is_undone_for_the_next_one() -> None:
    """PostgreSQL refuses whatever comes in it, and nothing of it can be committed."""
    me, failed = unit(), unit("repom_0", failed=True)
    found = turn(me, [failed])
    assert found.sql[:2] == ("ROLLBACK TO SAVEPOINT repom_0", "RELEASE SAVEPOINT repom_0")
    assert found.undone == (failed,)


def test_failed_savepoint_is_healed_for_the_next_one() -> None:
    """No more is undone than would be in any case."""
    me = unit()
    failed = unit("repom_0", failed=True, own_savepoints=["one", "two"])
    found = turn(me, [failed], NOBODY._replace(units=(failed,)))
    assert found.sql == ("ROLLBACK TO SAVEPOINT two", "SAVEPOINT repom_1")
    assert found.stack == (failed, me)


def test_unit_inside_of_another_one() -> None:
    """Begun in the same context, or in a scope inside of its scope: waiting would be forever."""
    outer_scope, inner_scope = Scope(None), Scope(None)
    inner_scope.parent = outer_scope
    outer = unit("repom_0")
    outer.caller = NOBODY._replace(scope=outer_scope)
    for caller in (
        NOBODY._replace(units=(outer,)),
        NOBODY._replace(scope=inner_scope),
        NOBODY._replace(scope=outer_scope),
    ):
        me = unit()
        assert turn(me, [outer], caller).stack == (outer, me)
    assert turn_of(unit(), [outer], NOBODY._replace(scope=Scope(None))) is None


class Scope:
    """As `repom.scope.SessionScope`, here."""

    in_transaction = True
    observer = None

    def __init__(self, parent: Any) -> None:
        self.parent = parent


TASK: Any = object()
OTHER_TASK: Any = object()
LOOP: Any = object()
OTHER_LOOP: Any = object()
IN_TASK = NOBODY._replace(task=TASK, loop=LOOP, awaits=True)
SCOPE, OTHER_SCOPE = Scope(None), Scope(None)

WAITING = [
    ("the same task", IN_TASK, IN_TASK, False),
    ("another task", IN_TASK, IN_TASK._replace(task=OTHER_TASK), True),
    ("a task that blocks its loop", IN_TASK._replace(awaits=False), IN_TASK, False),
    (
        "another task, whose loop would be blocked",
        IN_TASK._replace(awaits=False),
        IN_TASK._replace(task=OTHER_TASK),
        False,
    ),
    (
        "a task of another loop",
        IN_TASK._replace(awaits=False),
        IN_TASK._replace(task=OTHER_TASK, loop=OTHER_LOOP),
        True,
    ),
    ("the same thread", NOBODY, NOBODY, False),
    ("another thread", NOBODY, NOBODY._replace(thread=-2), True),
    ("a task, in a thread", NOBODY, IN_TASK._replace(thread=-2), True),
    ("a thread, in a task", IN_TASK, NOBODY._replace(thread=-2), True),
    (
        "another scope, in a thread that serves many",
        NOBODY._replace(scope=SCOPE),
        NOBODY._replace(scope=OTHER_SCOPE),
        True,
    ),
]


@pytest.mark.parametrize(
    ("caller", "holder", "can_wait"), [row[1:] for row in WAITING], ids=[row[0] for row in WAITING]
)
def test_who_can_be_waited_for(caller: Caller, holder: Caller, can_wait: bool) -> None:
    """Nobody waits for what can only go on when the one who waits does."""
    other = unit("repom_0")
    other.caller = holder
    assert caller.can_wait_for(other) is can_wait
    me, known = unit(), unit("repom_1")
    assert (turn_of(me, [other], caller) is None) is can_wait
    assert (turn_of(known, [known, other], caller) is None) is can_wait


def test_name_that_is_free() -> None:
    """Few names are used, and none twice at a time."""
    me, one, two = unit(), unit("repom_0"), unit("repom_2")
    assert turn(me, [one, two], NOBODY._replace(units=(two,))).begins == "repom_1"

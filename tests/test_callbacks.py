"""`on_commit` and `on_rollback`: which callback is due when, decided by what SQLAlchemy tells."""

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, SessionTransaction

from repom.callbacks import Callbacks
from repom.cursors import Cursors
from repom.gate import ThreadGate
from repom.managed import managed_class


class Told:
    """A managed session on no database to speak of, and what its callbacks were called for."""

    def __init__(self) -> None:
        self.callbacks = Callbacks()
        self.engine = create_engine("sqlite://")
        self.session = managed_class(Session)(self.engine)
        vars(self.session).update(
            repom_gate=ThreadGate(),
            repom_inner_commits="allow",
            repom_callbacks=self.callbacks,
            repom_cursors=Cursors(),
        )

    def register(self, name: str) -> None:
        """Register both kinds under `name`, in the savepoint that is open."""
        savepoint = self.session.get_nested_transaction()
        self.callbacks.on_commit(name_it(f"{name} committed"), savepoint)
        self.callbacks.on_rollback(name_it(f"{name} rolled back"), savepoint)

    def due(self) -> list[str]:
        """What is due, each given out once."""
        found = []
        while due := self.callbacks.next_due():
            found.append(due.callback())
        return found


def name_it(name: str) -> Callable[[], str]:
    return lambda: name


@pytest.fixture
def told() -> Iterator[Told]:
    told = Told()
    yield told
    told.session.close()
    told.engine.dispose()


def begin(told: Told) -> SessionTransaction:
    told.session.execute(text("select 1"))
    return told.session.begin_nested()


def test_commit_makes_those_of_the_transaction_due_in_order(told: Told) -> None:
    """Once: a second transaction knows nothing of them."""
    told.register("a")
    told.register("b")
    told.session.commit()
    assert told.due() == ["a committed", "b committed"]
    told.session.execute(text("select 1"))
    told.session.rollback()
    assert told.due() == []
    assert told.callbacks.is_empty


@pytest.mark.parametrize("end", [Session.rollback, Session.close, Session.invalidate])
def test_every_end_that_is_no_commit_is_a_rollback(
    told: Told, end: Callable[[Session], None]
) -> None:
    told.register("a")
    told.session.execute(text("select 1"))
    getattr(told.session, end.__name__)()
    assert told.due() == ["a rolled back"]
    assert told.callbacks.is_empty


def test_released_savepoint_decides_nothing(told: Told) -> None:
    """What was registered in it becomes due when the transaction ends."""
    with begin(told):
        told.register("inside")
    assert told.due() == []
    told.session.commit()
    assert told.due() == ["inside committed"]


def test_savepoint_that_is_rolled_back_decides_for_those_registered_in_it(told: Told) -> None:
    told.register("before")
    savepoint = begin(told)
    told.register("inside")
    savepoint.rollback()
    told.register("after")
    told.session.commit()
    assert told.due() == ["inside rolled back", "before committed", "after committed"]


def test_released_savepoint_inside_one_that_is_rolled_back(told: Told) -> None:
    """It is undone with the outer one."""
    outer = begin(told)
    with told.session.begin_nested():
        told.register("inner")
    outer.rollback()
    told.session.commit()
    assert told.due() == ["inner rolled back"]


def test_inner_savepoint_is_rolled_back_alone(told: Told) -> None:
    with begin(told):
        told.register("outer")
        inner = told.session.begin_nested()
        told.register("inner")
        inner.rollback()
    told.session.commit()
    assert told.due() == ["inner rolled back", "outer committed"]


def test_transaction_that_is_rolled_back_takes_its_savepoints_with_it(told: Told) -> None:
    begin(told)
    told.register("inside")
    told.session.rollback()
    assert told.due() == ["inside rolled back"]


def test_same_function_registered_in_two_places_is_two_callbacks(told: Told) -> None:
    callback = name_it("same")
    told.callbacks.on_rollback(callback, None)
    savepoint = begin(told)
    told.callbacks.on_rollback(callback, savepoint)
    savepoint.rollback()
    assert told.due() == ["same"]
    told.session.rollback()
    assert told.due() == ["same"]


def test_forgetting_leaves_those_that_are_due(told: Told) -> None:
    """An outcome that is not known says nothing about a savepoint that was undone before."""
    savepoint = begin(told)
    told.register("undone")
    savepoint.rollback()
    told.register("unknown")
    assert told.callbacks.forget() == 2
    assert told.due() == ["undone rolled back"]


def test_dropping_counts_those_that_are_due(told: Told) -> None:
    told.register("a")
    told.session.commit()
    told.register("b")
    assert told.callbacks.drop() == 3
    assert told.callbacks.is_empty

import doctest
import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    CheckConstraint,
    Engine,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    MetaData,
    UniqueConstraint,
    create_engine,
    event,
    func,
    inspect,
    select,
)
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    Mapped,
    MappedAsDataclass,
    Session,
    composite,
    deferred,
    mapped_column,
    relationship,
    synonym,
)
from sqlalchemy.schema import CreateIndex, CreateTable

import repom.models
from repom.models import NAMING_CONVENTION, Base


class Model(Base):
    """The tests' own base: their tables stay out of `Base.metadata`, which the process shares."""

    __abstract__ = True
    metadata = MetaData(naming_convention=Base.metadata.naming_convention)


class Point:
    def __init__(self, x: int, y: int) -> None:
        self.x, self.y = x, y

    def __composite_values__(self) -> tuple[int, int]:
        return self.x, self.y


class Place(Model):
    __tablename__ = "places"

    id: Mapped[int] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column("name")
    state: Mapped[str] = mapped_column(server_default="new")
    changed: Mapped[str | None] = mapped_column(onupdate=func.upper("changed"))
    notes: Mapped[str | None] = mapped_column(deferred=True)
    x: Mapped[int] = mapped_column(default=1)
    y: Mapped[int] = mapped_column(default=2)
    point: Mapped[Point] = composite("x", "y")
    title: Mapped[str] = synonym("label")
    visits: Mapped[list["Visit"]] = relationship(lambda: Visit, back_populates="place")
    loud_label: Mapped[str] = deferred(func.upper("label"))

    @hybrid_property
    def shout(self) -> str:
        return self.label.upper()


class Visit(Model):
    __tablename__ = "visits"

    place_id: Mapped[int] = mapped_column(ForeignKey("places.id"), primary_key=True)
    number: Mapped[int] = mapped_column("no", primary_key=True)
    place: Mapped[Place] = relationship(back_populates="visits")


class Animal(Model):
    """`__mapper_args__` of its own, as every polymorphic class has."""

    __tablename__ = "animals"
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    changed: Mapped[str | None] = mapped_column(onupdate=func.upper("animal"))


class Dog(Animal):
    __tablename__ = "dogs"
    __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(ForeignKey("animals.id"), primary_key=True)
    name: Mapped[str]
    trained: Mapped[str] = mapped_column(server_default="no", onupdate=func.upper("dog"))


class Versioned:
    __mapper_args__ = {"eager_defaults": False}  # noqa: RUF012


class Lazy(Versioned, Model):
    __tablename__ = "lazies"

    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path}/models.db")
    Model.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def statements(engine: Engine) -> list[str]:
    """What the engine has been asked to execute."""
    seen: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def record(_c: Any, _k: Any, statement: str, _p: Any, _x: Any, _m: Any) -> None:
        seen.append(statement)

    return seen


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine) as session:
        yield session


def saved(session: Session) -> Place:
    place = Place(id=1, label="Oulu", notes="cold", visits=[Visit(number=7)])
    session.add(place)
    session.commit()
    return place


COLUMNS = {"id": 1, "label": "Oulu", "state": "new", "changed": None, "x": 1, "y": 2}

# --- to_dict ---------------------------------------------------------------------------------


def test_to_dict_has_the_loaded_columns_only(session: Session, statements: list[str]) -> None:
    """Column attributes by attribute name; no deferred ones, relationships, hybrids, synonyms."""
    saved(session)
    session.expunge_all()
    place = session.scalars(select(Place)).one()
    statements.clear()
    assert place.to_dict() == COLUMNS
    assert statements == []


def test_to_dict_takes_what_has_been_loaded_since(session: Session) -> None:
    """A deferred column is in once somebody has loaded it."""
    saved(session)
    session.expunge_all()
    place = session.scalars(select(Place)).one()
    assert place.notes == "cold"
    assert place.visits
    assert place.to_dict() == {**COLUMNS, "notes": "cold"}


def test_to_dict_of_an_object_that_is_not_saved() -> None:
    """A transient object shows what was set; nothing is invented for the rest."""
    assert Place().to_dict() == {}
    assert Place(label="Oulu", point=Point(3, 4)).to_dict() == {"label": "Oulu", "x": 3, "y": 4}


def test_to_dict_of_a_pending_object_does_not_flush(
    session: Session, statements: list[str]
) -> None:
    """Asking a pending object is no reason to write it."""
    place = Place(label="Oulu")
    session.add(place)
    assert place.to_dict() == {"label": "Oulu"}
    assert statements == []
    assert place in session.new


def test_to_dict_of_an_expired_object_loads_nothing(
    session: Session, statements: list[str]
) -> None:
    """After a commit that expires, only what was set anew is there."""
    place = saved(session)
    statements.clear()
    assert place.to_dict() == {}
    place.label = "Espoo"
    assert place.to_dict() == {"label": "Espoo"}
    assert statements == []


def test_to_dict_of_a_detached_object(session: Session, statements: list[str]) -> None:
    """Code after the session, such as a response model, gets what was loaded, and no error."""
    place = saved(session)
    session.refresh(place)
    session.close()
    statements.clear()
    assert place.to_dict() == COLUMNS
    again = pickle.loads(pickle.dumps(place))
    assert again.to_dict() == COLUMNS
    assert statements == []


def test_to_dict_is_a_copy(session: Session) -> None:
    """Changing the dict does not change the row."""
    place = saved(session)
    session.refresh(place)
    place.to_dict()["label"] = "Espoo"
    assert place not in session.dirty


# --- repr ------------------------------------------------------------------------------------


def test_repr_shows_the_primary_key(session: Session, statements: list[str]) -> None:
    """By attribute name, all its columns, in every state of the object, and without IO."""
    place = saved(session)
    session.refresh(place)
    [visit] = place.visits
    session.expire_all()
    statements.clear()
    assert repr(place) == "Place(id=1)"
    assert repr(visit) == "Visit(place_id=1, number=7)"
    session.close()
    assert repr(place) == "Place(id=1)"
    assert statements == []


def test_repr_before_there_is_a_key(session: Session) -> None:
    """A transient or pending object shows what is known of its key."""
    visit = Visit(number=7)
    assert repr(visit) == "Visit(place_id=None, number=7)"
    session.add(visit)
    assert repr(visit) == "Visit(place_id=None, number=7)"


def test_repr_of_an_inherited_key(session: Session) -> None:
    """A subclass with a table of its own shows the key it shares with its parent once."""
    dog = Dog(id=5, name="Rex")
    session.add(dog)
    session.commit()
    assert repr(dog) == "Dog(id=5)"


# --- server defaults -------------------------------------------------------------------------


def test_server_defaults_are_there_after_the_flush(session: Session, statements: list[str]) -> None:
    """INSERT and UPDATE bring back what the server made: reading it is no further statement."""
    place = Place(label="Oulu")
    session.add(place)
    session.flush()
    place.label = "Espoo"
    session.flush()
    count = len(statements)
    assert (place.state, place.changed) == ("new", "CHANGED")
    assert len(statements) == count


def test_mapper_args_of_a_subclass_do_not_turn_that_off(
    session: Session, statements: list[str]
) -> None:
    """A polymorphic class replaces `__mapper_args__` and keeps the defaults read back."""
    dog = Dog(name="Rex")
    session.add(dog)
    session.flush()
    assert dog.trained == "no"
    dog.name = "Max"
    dog.kind = "dog"
    session.flush()
    count = len(statements)
    assert dog.trained == "DOG"
    assert len(statements) == count
    assert Animal.__mapper__.eager_defaults is True


def test_a_class_may_turn_it_off() -> None:
    """An explicit `eager_defaults`, a mixin's too, is left as it is."""
    assert Lazy.__mapper__.eager_defaults is False


async def test_async_code_needs_no_lazy_load(engine: Engine) -> None:
    """What async code cannot load on access is there, or can be awaited."""
    async_engine = create_async_engine(engine.url.set(drivername="sqlite+aiosqlite"))
    try:
        async with AsyncSession(async_engine, expire_on_commit=False) as session:
            place = Place(id=1, label="Oulu", visits=[Visit(number=7)])
            session.add(place)
            await session.flush()
            place.label = "Espoo"
            await session.commit()
            assert place.changed == "CHANGED"
            session.expunge_all()
            place = (await session.scalars(select(Place))).one()
            assert "visits" in inspect(place).unloaded
            assert [visit.number for visit in await place.awaitable_attrs.visits] == [7]
    finally:
        await async_engine.dispose()


# --- names of constraints --------------------------------------------------------------------


class Named(Model):
    __tablename__ = "named"

    id: Mapped[int] = mapped_column(primary_key=True)
    a: Mapped[int] = mapped_column(unique=True)
    b: Mapped[int] = mapped_column(index=True)
    c: Mapped[int] = mapped_column(ForeignKey("places.id"))
    __table_args__ = (
        UniqueConstraint("a", "b"),
        UniqueConstraint("a", "c"),
        Index(None, "b", "c"),
        ForeignKeyConstraint(["a", "b"], ["visits.place_id", "visits.no"]),
        CheckConstraint("a > 0", name="positive"),
    )


def test_every_constraint_has_a_name(engine: Engine) -> None:
    """A migration can address each; composite ones that begin alike differ."""
    table = Named.metadata.tables["named"]
    ddl = str(CreateTable(table).compile(engine))
    for name in (
        "pk_named PRIMARY KEY (id)",
        "uq_named_a UNIQUE (a)",
        "uq_named_a_b UNIQUE (a, b)",
        "uq_named_a_c UNIQUE (a, c)",
        "fk_named_c_places FOREIGN KEY(c)",
        "fk_named_a_b_visits FOREIGN KEY(a, b)",
        "ck_named_positive CHECK (a > 0)",
    ):
        assert f"CONSTRAINT {name}" in ddl
    indexes = {str(CreateIndex(index).compile(engine)) for index in table.indexes}
    assert indexes == {
        "CREATE INDEX ix_named_b ON named (b)",
        "CREATE INDEX ix_named_b_c ON named (b, c)",
    }


def test_unnamed_check_is_refused() -> None:
    """SQLAlchemy itself asks for the one name that no convention can find."""
    metadata = MetaData(naming_convention=NAMING_CONVENTION)
    table = Named.metadata.tables["named"].to_metadata(metadata, name="unnamed")
    with pytest.raises(InvalidRequestError, match="constraint_name"):
        table.append_constraint(CheckConstraint("b > 0"))


# --- other people's bases --------------------------------------------------------------------


def test_mapped_as_dataclass(engine: Engine) -> None:
    """An abstract `MappedAsDataclass` base on top makes dataclasses with all of the above."""

    class DataclassModel(MappedAsDataclass, Model):
        __abstract__ = True

    class City(DataclassModel):
        __tablename__ = "cities"

        id: Mapped[int] = mapped_column(primary_key=True, init=False)
        name: Mapped[str]
        state: Mapped[str] = mapped_column(server_default="new", init=False)

    DataclassModel.metadata.create_all(engine)
    with Session(engine) as session:
        city = City(name="Oulu")
        session.add(city)
        session.flush()
        assert city.to_dict() == {"id": 1, "name": "Oulu", "state": "new"}
    assert repr(city).endswith("City(id=1, name='Oulu', state='new')")
    assert City.__mapper__.eager_defaults is True


def test_fastapi_users_table(engine: Engine) -> None:
    """FastAPI Users' mixin and repom's Base make one class, with both sides' columns."""
    # An installer that may not take 7, which needs SQLAlchemy < 2.1, goes back to 4.
    users = pytest.importorskip("fastapi_users_db_sqlalchemy", minversion="7")

    class Account(users.SQLAlchemyBaseUserTable[int], Model):  # type: ignore[misc, name-defined]
        __tablename__ = "accounts"

        id: Mapped[int] = mapped_column(primary_key=True)
        plan: Mapped[str] = mapped_column(server_default="free")

    Model.metadata.create_all(engine)
    with Session(engine) as session:
        account = Account(email="a@example.com", hashed_password="x")
        session.add(account)
        session.flush()
        assert account.to_dict() == {
            "id": 1,
            "plan": "free",
            "email": "a@example.com",
            "hashed_password": "x",
            "is_active": True,
            "is_superuser": False,
            "is_verified": False,
        }


def test_examples_of_the_docstrings() -> None:
    """The examples in the docstrings do what they show."""
    # An example's classes leave SQLAlchemy's registry only when they are collected; a second run
    # of the examples in this process, here or by another test, would warn of the same names.
    gc.collect()
    results = doctest.testmod(repom.models)
    gc.collect()
    assert results.attempted > 0
    assert results.failed == 0

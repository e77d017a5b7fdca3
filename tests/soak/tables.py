"""What the requests of a soak write, and what must be true of it whatever has happened.

The work of a transaction is `ROWS` entries with the number of the request and the name of the
transaction in it; half of them is what must never be seen. Money moves between accounts, and
visitors are counted, so that two transactions which saw each other's half would show.
"""

from typing import Any

from sqlalchemy import ForeignKey, MetaData
from sqlalchemy.engine import make_url
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tests.support.reader import ask, execute, rows

ROWS = 3
ACCOUNTS = 8
BALANCE = 1000
BALLAST_ROWS, BALLAST_BYTES = 300, 500

#: No entry has this id: one that names it as its parent is refused, by COMMIT where it can be.
NOWHERE = -1


class Base(DeclarativeBase):
    metadata = MetaData()  # which no other test creates


class Entry(Base):
    __tablename__ = "soak_entry"
    id: Mapped[int] = mapped_column(primary_key=True)
    request: Mapped[int]
    part: Mapped[str]
    number: Mapped[int]
    parent: Mapped[int | None] = mapped_column(ForeignKey("soak_entry.id"))


class Account(Base):
    __tablename__ = "soak_account"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    balance: Mapped[int]


class Transfer(Base):
    __tablename__ = "soak_transfer"
    id: Mapped[int] = mapped_column(primary_key=True)
    source: Mapped[int]
    target: Mapped[int]
    amount: Mapped[int]


class Counter(Base):
    __tablename__ = "soak_counter"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[int]


class Ballast(Base):
    """Rows that nobody changes, enough of them for a long response."""

    __tablename__ = "soak_ballast"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str]


def ballast(id_: int) -> str:
    return f"{id_:0{BALLAST_BYTES - 1}}\n"


def backend(url: str) -> str:
    """ "sqlite", "postgresql" or "mysql"."""
    return make_url(url).get_backend_name()


def prepare(url: str) -> None:
    """Make and fill the tables."""
    kind = backend(url)
    number = {"sqlite": "INTEGER PRIMARY KEY", "postgresql": "SERIAL PRIMARY KEY"}
    key = number.get(kind, "INTEGER PRIMARY KEY AUTO_INCREMENT")
    deferred = "" if kind == "mysql" else "REFERENCES soak_entry (id) DEFERRABLE INITIALLY DEFERRED"
    for statement in (
        f"CREATE TABLE soak_entry (id {key}, request INTEGER NOT NULL, part VARCHAR(20) NOT NULL,"
        f" number INTEGER NOT NULL, parent INTEGER {deferred}, UNIQUE (request, part, number))",
        "CREATE TABLE soak_account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL)",
        f"CREATE TABLE soak_transfer (id {key}, source INTEGER, target INTEGER, amount INTEGER)",
        "CREATE TABLE soak_counter (id INTEGER PRIMARY KEY, value INTEGER NOT NULL)",
        "INSERT INTO soak_counter VALUES (1, 0)",
        f"CREATE TABLE soak_ballast (id INTEGER PRIMARY KEY, text VARCHAR({BALLAST_BYTES}))",
        "INSERT INTO soak_account VALUES "
        + ", ".join(f"({id_}, {BALANCE})" for id_ in range(1, ACCOUNTS + 1)),
        "INSERT INTO soak_ballast VALUES "
        + ", ".join(f"({id_}, '{ballast(id_)}')" for id_ in range(BALLAST_ROWS)),
    ):
        execute(url, statement)
    if kind == "postgresql":
        # A deadlock is found after this time, in which its transactions stop many others.
        execute(
            url,
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET deadlock_timeout = 50',"
            " current_database()); END $$",
        )


def broken_invariants(url: str) -> list[str]:
    """What is not as it must be, of the accounts and of the counter."""
    problems = []
    for id_, balance, recorded in rows(
        url,
        f"SELECT id, balance, {BALANCE}"
        " + (SELECT coalesce(sum(amount), 0) FROM soak_transfer WHERE target = soak_account.id)"
        " - (SELECT coalesce(sum(amount), 0) FROM soak_transfer WHERE source = soak_account.id)"
        " FROM soak_account",
    ):
        if balance != recorded:
            problems.append(f"account {id_} holds {balance}, its transfers say {recorded}")
    [(value, counted)] = rows(
        url,
        "SELECT value, (SELECT count(*) FROM soak_entry WHERE part = 'count')"
        " FROM soak_counter WHERE id = 1",
    )
    if value != counted // ROWS:
        problems.append(f"the counter says {value}, counted were {counted // ROWS}")
    return problems


def written(url: str) -> dict[tuple[int, str], int]:
    """How many entries each transaction has committed."""
    found = rows(url, "SELECT request, part, count(*) FROM soak_entry GROUP BY request, part")
    return {(request, part): count for request, part, count in found}


def written_by(connection: Any, request: int) -> dict[str, int]:
    """The same of one request, asked on a connection of `reader.connect()`."""
    found = ask(
        connection,
        "SELECT part, count(*) FROM soak_entry WHERE request = %s GROUP BY part",
        request,
    )
    return dict(found)

"""End the prepared transactions that a crash has left: `python -m repom.recovery`.

A two-phase commit that was broken off, because the process or a server has died, leaves prepared
transactions in the databases. They keep their locks, and survive a restart, until somebody ends
them. This finds those of repom, and commits or rolls back each unit of work as a whole.

It needs a sync driver for each database: psycopg or psycopg2, PyMySQL or mysqlclient.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from repom.config import get_config
from repom.database import Database
from repom.dialects.mysql import errno
from repom.errors import ConfigurationError, RepomError
from repom.in_doubt import InDoubt, Verdict, in_doubt, in_order, verdict
from repom.registry import CONFIGURED, DEFAULT, as_databases
from repom.transaction_ids import PREFIX, fingerprint

T = TypeVar("T")

#: Seconds after which what is still prepared is taken for left over: twice the time limit that
#: the end of a unit of work has by default.
WAIT = 60.0

_POSTGRESQL = (
    "SELECT gid FROM pg_prepared_xacts"
    f" WHERE database = current_database() AND gid LIKE '{PREFIX}%'"
)
_END: dict[tuple[str, Verdict], str] = {
    ("postgresql", "commit"): "COMMIT PREPARED '{}'",
    ("postgresql", "roll back"): "ROLLBACK PREPARED '{}'",
    ("mysql", "commit"): "XA COMMIT '{}'",
    ("mysql", "roll back"): "XA ROLLBACK '{}'",
}


_ROLLED_BACK = 1402  # ER_XA_RBROLLBACK


class Recovery:
    """The prepared transactions of some databases.

    Args:
        databases: all those of the application, by any name.
    """

    def __init__(self, databases: Mapping[str, Database]) -> None:
        self._known = fingerprint(database.url for database in databases.values())
        self._databases = {
            name: database
            for name, database in databases.items()
            if (_dialect(database), "commit") in _END
        }

    def find(self) -> list[InDoubt]:
        """The units of work of which something is prepared now.

        Raises:
            DatabaseUnreachableError: a database does not answer. The others would not tell
                enough to end anything.
        """
        return in_doubt({name: self._prepared_on(name) for name in self._databases})

    def verdict(self, unit: InDoubt) -> Verdict:
        """How `unit` is to end."""
        return verdict(unit, self._known)

    def end(self, unit: InDoubt, how: Verdict) -> None:
        """Commit `unit`, or roll it back.

        Raises:
            SQLAlchemyError: a database has refused; what comes after it in the order that keeps
                the verdict has not been touched.
        """
        for number in in_order(unit.branches, how):
            self._end_branch(unit, number, how)

    def _end_branch(self, unit: InDoubt, number: int, how: Verdict) -> None:
        name = unit.branches[number][0]
        sql = _END[_dialect(self._databases[name]), how].format(unit.id(number))
        try:
            self._ask(name, lambda connection: connection.exec_driver_sql(sql))
        except DBAPIError as error:
            # MariaDB says so of a branch that has written nothing, whatever it is told.
            is_rolled_back = error.orig is not None and errno(error.orig) == _ROLLED_BACK
            if not (is_rolled_back and how == "roll back"):
                raise

    def _prepared_on(self, name: str) -> list[str]:
        if _dialect(self._databases[name]) == "postgresql":
            return self._ask(name, lambda connection: [*connection.scalars(text(_POSTGRESQL))])
        return self._ask(name, _xa_recover)

    def _ask(self, name: str, question: Callable[[Connection], T]) -> T:
        engine = self._databases[name].new_engine(poolclass=NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            return question(connection)


def _dialect(database: Database) -> str:
    backend = database.url.get_backend_name()
    return "mysql" if backend == "mariadb" else backend


def _xa_recover(connection: Connection) -> list[str]:
    rows = connection.exec_driver_sql("XA RECOVER").mappings()
    ids = (row["data"] for row in rows)
    return [id_.decode("latin-1") if isinstance(id_, bytes) else id_ for id_ in ids]


# --- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Its exit status: 0 if nothing was left over, or is any more; 1 if something is; 2 if
        that is not known.
    """
    options = _parser().parse_args(arguments)
    try:
        recovery = Recovery(_databases(options.database))
        units = recovery.find()
        if by_hand := options.commit or options.rollback:
            chosen = next((unit for unit in units if unit.unit == by_hand), None)
            return _end(recovery, chosen, "commit" if options.commit else "roll back")
        if units and options.end:
            units = _left_over(recovery, units, options.wait)
            ended = [_end(recovery, unit, recovery.verdict(unit)) for unit in units]
            return max(ended, default=0)
    except RepomError as error:
        print(error, file=sys.stderr)
        return 2
    for unit in units:
        print(f"{_shown(unit)}: {recovery.verdict(unit)}")
    return 1 if units else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m repom.recovery",
        description="List the units of work of which a crash has left something prepared, and end"
        " them. Without options, nothing is changed.",
    )
    parser.add_argument(
        "database",
        nargs="*",
        metavar="NAME=URL",
        help="all databases of the application, with the URLs it uses (default: those of its"
        " configuration)",
    )
    parser.add_argument("--end", action="store_true", help="end all of which is certain how")
    parser.add_argument(
        "--wait",
        type=float,
        default=WAIT,
        metavar="SECONDS",
        help="with --end: what has not ended by itself after so long is left over (default: 60)",
    )
    by_hand = parser.add_mutually_exclusive_group()
    by_hand.add_argument("--commit", metavar="UNIT", help="commit this one, on your own authority")
    by_hand.add_argument("--rollback", metavar="UNIT", help="roll this one back, likewise")
    return parser


def _databases(given: Sequence[str]) -> dict[str, Database]:
    if not given:
        names = [DEFAULT, *get_config().databases]
        return {name: CONFIGURED[name] for name in names}
    named: dict[str, str] = {}
    for pair in given:
        name, _, url = pair.partition("=")
        named[name] = url
    if "" in named.values():
        raise ConfigurationError("a database is given without a name: write NAME=URL.")
    return dict(as_databases(named).items())


def _left_over(recovery: Recovery, before: Sequence[InDoubt], wait: float) -> list[InDoubt]:
    """What was there before and still is: of that, nobody is at work at its end."""
    print(f"waiting {wait:g} s, for what is about to end by itself", file=sys.stderr)
    time.sleep(wait)
    names = {unit.unit for unit in before}
    return [unit for unit in recovery.find() if unit.unit in names]


def _end(recovery: Recovery, unit: InDoubt | None, how: Verdict) -> int:
    if unit is None:
        print("nothing of that unit of work is prepared.", file=sys.stderr)
        return 2
    if how == "unknown":
        print(
            f"{_shown(unit)}: left as it is, since it is of an application with other databases"
            " than these. Name all of them, with the URLs that it uses."
        )
        return 1
    try:
        recovery.end(unit, how)
    except SQLAlchemyError as error:
        print(f"{_shown(unit)}: could not {how}: {error}", file=sys.stderr)
        return 1
    print(f"{_shown(unit)}: {'committed' if how == 'commit' else 'rolled back'}")
    return 0


def _shown(unit: InDoubt) -> str:
    places = sorted(unit.branches.items())
    return f"{unit.unit} " + ", ".join(f"{number} on {names[0]}" for number, names in places)


if __name__ == "__main__":
    sys.exit(main())

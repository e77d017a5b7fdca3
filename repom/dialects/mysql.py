"""MySQL and MariaDB: aiomysql, asyncmy, pymysql and mysqlclient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import URL, Engine, event

from repom.dialects.base import Support

# The server has rolled the whole transaction back, and goes on in a new one without a word.
_ABORTS = frozenset(
    {
        # ER_LOCK_DEADLOCK (https://dev.mysql.com/doc/refman/8.4/en/innodb-error-handling.html),
        # on Galera also a failed certification
        1213,
        # ER_CHECKREAD, of MariaDB with innodb_snapshot_isolation, its default since 11.6.2
        # (https://mariadb.com/kb/en/innodb-system-variables/#innodb_snapshot_isolation)
        1020,
        1206,  # ER_LOCK_TABLE_FULL
        1180,  # ER_ERROR_DURING_COMMIT
    }
)
# ER_LOCK_WAIT_TIMEOUT undoes its statement only, or everything where the server was started
# with innodb_rollback_on_timeout.
_LOCK_WAIT_TIMEOUT = 1205

_SHUTDOWN = 1053  # ER_SERVER_SHUTDOWN
_OPTION_PREVENTS = 1290  # ER_OPTION_PREVENTS_STATEMENT, of which option the message says
_DEMOTED = frozenset(
    {
        1836,  # ER_READ_ONLY_MODE
        1047,  # of a Galera node that has no quorum, or is joining
    }
)


class MySQL(Support):
    """Remembers that the server rolled back, because the connection does not show it."""

    def __init__(self, url: URL, connect_args: Mapping[str, Any], *, is_async: bool) -> None:
        super().__init__(url, connect_args, is_async=is_async)
        self._aborts = _ABORTS

    def install(self, engine: Engine) -> None:
        super().install(engine)
        event.listen(engine, "first_connect", self._ask_server)

    def aborts(self, error: Exception, driver_connection: Any) -> bool:
        return errno(error) in self._aborts

    def is_last_word(self, error: Exception) -> bool:
        return errno(error) == _SHUTDOWN

    def is_demoted(self, error: Exception) -> bool:
        number = errno(error)
        if number == _OPTION_PREVENTS:
            # `--read-only` or `--super-read-only`; the words around it are the server's language
            return "read-only" in str(error).replace("_", "-")
        return number in _DEMOTED

    def check_two_phase(self) -> None:
        """XA is SQL, which every driver can send."""

    def abandon(self, driver_connection: Any) -> None:
        driver_connection.close()

    def _ask_server(self, dbapi_connection: Any, record: Any) -> None:
        # Once for each engine: the variable cannot be changed while the server runs.
        cursor = dbapi_connection.cursor()
        try:
            cursor.execute("SHOW GLOBAL VARIABLES LIKE 'innodb_rollback_on_timeout'")
            row = cursor.fetchone()
        finally:
            cursor.close()
        if row is not None and row[1] in ("ON", "1", 1):
            self._aborts |= {_LOCK_WAIT_TIMEOUT}


def errno(error: BaseException) -> int | None:
    """The server's error number in an exception of any MySQL driver."""
    number = error.args[0] if error.args else None
    return number if isinstance(number, int) else None

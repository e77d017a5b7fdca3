"""Which database a request is about: `DatabaseSessionMiddleware(app, choose)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn
from weakref import WeakSet

from repom.config import get_config
from repom.database import Database
from repom.errors import ConfigurationError, UnknownDatabaseError
from repom.middleware.policy import Scope
from repom.registry import CONFIGURED, DEFAULT, Databases

#: `choose(asgi_scope)` gives a `Database`, the name of a configured one, or None for the
#: configured default.
Choose = Callable[[Any], Database | str | None]


class PerRequest(Databases):
    """The databases of an application that has another default one for each request.

    Where no request is, such as in the lifespan, a database has to be named.
    """

    def __init__(self, choose: Choose) -> None:
        super().__init__({})
        self.choose = choose
        # Weakly: how long a database is kept is up to the application.
        self._chosen: WeakSet[Database] = WeakSet()

    def __getitem__(self, database: str | Database | None) -> Database:
        if database is None or database == DEFAULT:
            raise UnknownDatabaseError(
                "which database is the default one is chosen for each request, and here is none.\n"
                "Name one, `session_scope(database)`, or give the Database itself."
            )
        return super().__getitem__(database)

    def to_check(self) -> list[Database]:
        return []  # none is known before the first request

    def to_dispose(self) -> list[Database]:
        return list(self._chosen)

    def of_request(self, asgi_scope: Scope) -> Databases:
        """The databases of one request, or of one WebSocket connection."""
        return Chosen(self, asgi_scope)

    def check_joined(self, outer: Databases) -> None:
        """Refuse to join a middleware that may mean another database.

        Raises:
            ConfigurationError: it does not choose by the same function.
        """
        # Compared, and not asked, which would be too early for what is to choose.
        if not (isinstance(outer, Chosen) and outer.per_request.choose == self.choose):
            raise ConfigurationError(
                "two DatabaseSessionMiddlewares disagree on the database: the one inside chooses "
                f"it for each request by {self.choose!r}, and the outer one does not.\n"
                "Give both middlewares the same function."
            )

    def choose_for(self, asgi_scope: Scope) -> Database:
        """Choose.

        Raises:
            Exception: what `choose` raised.
            ConfigurationError: it returned something that is no database.
            UnknownDatabaseError: no database is configured under the name that it returned.
        """
        choice = self.choose(asgi_scope)
        if not isinstance(choice, Database):
            if choice is not None and (not isinstance(choice, str) or ":" in choice):
                _refuse(choice)
            choice = CONFIGURED[choice]
        self._chosen.add(choice)
        return choice


class Chosen(Databases):
    """The databases of one request. The default one is chosen when it is first asked for.

    So a request that needs none costs none; what the layers inside the middleware have found out
    is in the ASGI scope by then; and an error of `choose` is raised where a session is asked for,
    and is answered by the application like any other.
    """

    def __init__(self, per_request: PerRequest, asgi_scope: Scope) -> None:
        super().__init__({})
        self.per_request = per_request
        self._asgi_scope: Scope | None = asgi_scope
        self._choice: Database | None = None

    def __getitem__(self, database: str | Database | None) -> Database:
        if database is None or database == DEFAULT:
            return self._choice or self._choose()
        return super().__getitem__(database)

    def _choose(self) -> Database:
        asgi_scope = self._asgi_scope
        if asgi_scope is not None:
            choice = self.per_request.choose_for(asgi_scope)
            # The first choice counts, where two threads ask for one at the same time. Whoever
            # keeps this object, such as a task that outlives the request, needs no more of it.
            self._choice, self._asgi_scope = self._choice or choice, None
        assert self._choice is not None
        return self._choice

    def known(self) -> list[Database]:
        return [self[DEFAULT], *(CONFIGURED[name] for name in get_config().databases)]

    def items(self) -> list[tuple[str, Database]]:
        return [] if self._choice is None else [(DEFAULT, self._choice)]


def _refuse(choice: object) -> NoReturn:
    if inspect.iscoroutine(choice):
        choice.close()
    if inspect.isawaitable(choice):
        raise ConfigurationError(
            "the function that chooses the database of a request has returned an awaitable.\n"
            "Write a plain function. What takes IO is found out before it: by an ASGI middleware "
            "that puts it into the scope."
        )
    raise ConfigurationError(
        f"the function that chooses the database of a request has returned a "
        f"{type(choice).__name__}.\nReturn a Database, the name of a configured one, or None for "
        "the default one; for URLs use a DatabaseCache, or each request would connect anew."
    )

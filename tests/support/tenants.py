"""Tenants that share one PostgreSQL database, kept apart by row-level security or by schemas."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url

from tests.support.reader import execute

#: Whose request, or job, this is.
tenant: ContextVar[str] = ContextVar("tenant")

#: A new row is of the tenant that writes it, as in an application it is by a default, too.
_ROWS = """
CREATE TABLE note (tenant TEXT NOT NULL DEFAULT current_setting('app.tenant'), text TEXT NOT NULL);
ALTER TABLE note ENABLE ROW LEVEL SECURITY;
ALTER TABLE note FORCE ROW LEVEL SECURITY;
CREATE POLICY of_tenant ON note USING (tenant = current_setting('app.tenant', true));
GRANT USAGE ON SCHEMA public TO {role};
GRANT ALL ON note TO {role}
"""

_SCHEMA = """
CREATE SCHEMA {name};
CREATE TABLE {name}.note (tenant TEXT NOT NULL DEFAULT '{name}', text TEXT NOT NULL);
GRANT USAGE ON SCHEMA {name} TO {role};
GRANT ALL ON ALL TABLES IN SCHEMA {name} TO {role}
"""


def choose_rows(connection: Connection) -> None:
    """An `on_begin`: the policies see whose transaction it is."""
    connection.execute(
        text("SELECT set_config('app.tenant', :tenant, true)"), {"tenant": tenant.get()}
    )


def choose_schema(connection: Connection) -> None:
    """An `on_begin`: names without a schema mean the tenant's."""
    connection.execute(
        text("SELECT set_config('search_path', quote_ident(:tenant), true)"),
        {"tenant": tenant.get()},
    )


@contextmanager
def tenants_url(postgres_url: str, *names: str) -> Iterator[str]:
    """The URL of a database with notes of all tenants, for a role that no policy exempts.

    Args:
        postgres_url: for the superuser.
        names: of tenants with schemas of their own; by default they share a table.
    """
    role = f"repom_tenants_{secrets.token_hex(4)}"
    execute(postgres_url, f"CREATE ROLE {role} LOGIN")
    try:
        if not names:
            execute(postgres_url, _ROWS.format(role=role))
        for name in names:
            execute(postgres_url, _SCHEMA.format(name=name, role=role))
        yield make_url(postgres_url).set(username=role).render_as_string(hide_password=False)
    finally:
        execute(postgres_url, f"DROP OWNED BY {role}; DROP ROLE {role}")

"""What all tests share: the databases, and the rule that nothing is left behind."""

import gc
from collections import Counter

import pytest

from tests.support.databases import (
    MYSQL,
    POSTGRES,
    database_url,
    mysql_database,
    mysql_url,
    postgres_database,
    postgres_url,
    sqlite_url,
)
from tests.support.leaks import no_task_left, nothing_left_behind
from tests.support.tenants import tenant_databases, tenant_urls

__all__ = [
    "database_url",
    "mysql_database",
    "mysql_url",
    "no_task_left",
    "nothing_left_behind",
    "postgres_database",
    "postgres_url",
    "sqlite_url",
    "tenant_databases",
    "tenant_urls",
]


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers."""
    config.addinivalue_line(
        "markers",
        "leaves_connections(reason): the test leaves connections open on purpose;"
        " they are terminated after it",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests were skipped for lack of a server, and how to run them."""
    skipped = Counter(
        server
        for report in terminalreporter.stats.get("skipped", [])
        for server in (POSTGRES, MYSQL)
        if f"no {server.name} server at " in str(report.longrepr)
    )
    for server, count in skipped.items():
        terminalreporter.write_line(
            f"{count} test(s) skipped for lack of a {server.name} server:"
            f" start one, or set {server.variable} (default {server.default})",
            yellow=True,
        )


def pytest_collection_finish() -> None:
    """Take what the imports made out of the garbage collector's sight."""
    # The collection after each database test then costs 2 ms and not 70.
    gc.collect()
    gc.freeze()

"""Databases for runs of pytest inside of a test."""

import pytest


@pytest.fixture(params=["sqlite", "memory", "postgresql", "mysql"])
def tested_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database of each kind; one in memory is that of the run alone."""
    if request.param == "memory":
        return "sqlite://"
    name = {"sqlite": "sqlite_url", "postgresql": "postgres_url", "mysql": "mysql_url"}
    url: str = request.getfixturevalue(name[request.param])
    return url

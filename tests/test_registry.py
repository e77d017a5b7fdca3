"""Which database a name stands for, and that nobody reads the configuration too early."""

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from repom.config import RepomConfig, reset_config
from repom.database import Database
from repom.errors import ConfigurationError, DatabaseURLError, UnknownDatabaseError
from repom.registry import (
    CONFIGURED,
    Databases,
    as_databases,
    configured_so_far,
    forget_configured,
    get_database,
)
from tests.support.polling import block_until

REPORTS = Database("sqlite:///reports.db")


class Config(RepomConfig):
    """Counts how often it is asked for the databases."""

    db_url = "sqlite:///default.db"

    @property
    def databases(self) -> Mapping[str, object]:
        return {
            "url": "postgresql://host/x",
            "parsed": make_url("postgresql://host/y"),
            "config": RepomConfig(db_url="mysql://host/z"),
            "reports": REPORTS,
            "wrong": 17,
        }


made: list[Config] = []


def make_config() -> Config:
    """The CONFIG_HOOK of these tests."""
    made.append(Config())
    return made[-1]


@pytest.fixture(autouse=True)
def configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """`make_config` is the hook, nothing has been read yet, and nothing stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONFIG_HOOK", f"{__name__}:make_config")
    made.clear()
    reset_config()
    forget_configured()
    yield
    reset_config()
    forget_configured()


def shown(database: Database) -> str:
    return str(database.url)


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("default", "sqlite:///default.db"),
        ("url", "postgresql://host/x"),
        ("parsed", "postgresql://host/y"),
        ("config", "mysql://host/z"),
        ("reports", "sqlite:///reports.db"),
    ],
)
def test_what_a_configured_name_stands_for(name: str, url: str) -> None:
    """A URL, a configuration or a `Database`, and it is one object for the whole process."""
    database = get_database(name)
    assert shown(database) == url
    assert get_database(name) is database
    assert CONFIGURED[name] is database
    assert configured_so_far() == [database]


def test_the_default_needs_no_name() -> None:
    """None and "default" mean the same."""
    assert get_database() is get_database("default") is CONFIGURED[None] is CONFIGURED["default"]


def test_a_configured_database_object_is_itself() -> None:
    """So that the application can import it, too."""
    assert get_database("reports") is REPORTS


def test_an_unknown_name_is_an_error_that_knows_the_others() -> None:
    """And that says where to add it."""
    with pytest.raises(
        UnknownDatabaseError, match=r"'typo'\. Known: .*reports.*\n.*databases"
    ) as e:
        get_database("typo")
    assert isinstance(e.value, LookupError)


def test_what_is_no_database_is_an_error_that_names_it() -> None:
    """With its type, and not its value, which may hold a password."""
    with pytest.raises(ConfigurationError, match=r"'wrong' is a int\.\nGive a URL"):
        get_database("wrong")


def test_threads_that_ask_at_once_get_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two would be two pools, and two databases in memory."""
    started: list[int] = []
    found: list[Database] = []

    def slow_config() -> Config:
        block_until(lambda: len(started) == 8)
        return Config()

    monkeypatch.setattr("repom.registry.get_config", slow_config)

    def ask() -> None:
        started.append(1)
        found.append(get_database("url"))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_forget_configured_reads_again() -> None:
    """For the tests of applications."""
    before = get_database()
    forget_configured()
    assert configured_so_far() == []
    assert get_database() is not before


# --- what an application gives -----------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [None, "reports", "postgresql://host/x", {"a": "sqlite://", "b": REPORTS}, REPORTS]
)
def test_the_configuration_is_not_read_before_it_is_needed(given: Any) -> None:
    """A middleware can be made when the application is imported, before it is configured."""
    as_databases(given)
    assert made == []


@pytest.mark.parametrize(
    ("given", "url"),
    [
        (None, "sqlite:///default.db"),
        ("default", "sqlite:///default.db"),
        ("reports", "sqlite:///reports.db"),
        (REPORTS, "sqlite:///reports.db"),
        ("postgresql://host/given", "postgresql://host/given"),
        (make_url("postgresql://host/given"), "postgresql://host/given"),
        ({"default": "postgresql://host/given"}, "postgresql://host/given"),
        ({"default": RepomConfig(db_url="postgresql://h/g")}, "postgresql://h/g"),
        ({"other": "postgresql://host/given"}, "sqlite:///default.db"),
    ],
)
def test_what_the_default_is_for_an_application(given: Any, url: str) -> None:
    """What it gave, or else what is configured."""
    databases = as_databases(given)
    assert shown(databases[None]) == shown(databases["default"]) == url
    assert databases[None] is databases["default"]


def test_other_names_are_looked_up_in_the_configuration() -> None:
    """An application gives what it wants to, and the rest is configured."""
    databases = as_databases({"mine": "sqlite:///mine.db"})
    assert shown(databases["mine"]) == "sqlite:///mine.db"
    assert databases["reports"] is REPORTS
    with pytest.raises(UnknownDatabaseError):
        databases["typo"]


def test_a_database_stands_for_itself() -> None:
    """Every function that takes a name takes the object, known by a name or not."""
    stranger = Database("sqlite://")
    assert as_databases(None)[stranger] is stranger
    assert as_databases("reports")[stranger] is stranger


def test_an_unusable_url_is_an_error_at_once() -> None:
    """Nothing has to be read to know that."""
    with pytest.raises(DatabaseURLError):
        as_databases({"default": "what is this"})
    with pytest.raises(DatabaseURLError):
        as_databases("://")


@pytest.mark.parametrize(
    ("given", "items"),
    [
        (None, []),
        ("reports", [("default", "sqlite:///reports.db")]),
        (
            {"b": "sqlite:///b.db", "a": "sqlite:///a.db"},
            [("b", "sqlite:///b.db"), ("a", "sqlite:///a.db")],
        ),
    ],
)
def test_the_databases_that_were_given(given: Any, items: list[tuple[str, str]]) -> None:
    """In the order in which they commit."""
    assert [(name, shown(database)) for name, database in as_databases(given).items()] == items


@pytest.mark.parametrize("database", ["a", REPORTS], ids=["name", "object"])
def test_an_overlay_changes_the_default_only(database: str | Database) -> None:
    """`session_scope("a")`: inside, `current_session()` means that one."""
    databases = as_databases({"default": "sqlite:///d.db", "a": "sqlite:///a.db"})
    overlaid = databases.overlaid(database)
    assert overlaid[None] is overlaid["default"] is databases[database]
    assert overlaid["a"] is databases["a"]
    assert databases.overlaid(None) is databases.overlaid("default") is databases
    assert overlaid.overlaid("default")[None] is databases[database]


def test_an_overlay_by_an_unknown_name_is_an_error_when_it_is_used() -> None:
    """It says which names there are."""
    with pytest.raises(UnknownDatabaseError):
        Databases({}).overlaid("typo")[None]


class Small(RepomConfig):
    db_url = "sqlite:///default.db"

    @property
    def databases(self) -> Mapping[str, object]:
        return {"reports": REPORTS}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ["sqlite:///reports.db", "sqlite:///default.db"]),
        ("sqlite:///other.db", ["sqlite:///reports.db", "sqlite:///other.db"]),
        (
            {"reports": "sqlite:///2.db", "other": "sqlite:///3.db"},
            ["sqlite:///2.db", "sqlite:///2.db", "sqlite:///3.db"],
        ),
    ],
)
def test_known_databases(monkeypatch: pytest.MonkeyPatch, given: Any, expected: list[str]) -> None:
    """Those of the configuration, unless others have their names, and those that were given;
    whichever is the default one."""
    monkeypatch.setitem(globals(), "make_config", Small)
    databases = as_databases(given)
    assert [shown(database) for database in databases.known()] == expected
    assert databases.overlaid("reports").known() == databases.known()
    assert databases.overlaid(Database("sqlite://")).known() == databases.known()

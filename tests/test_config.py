import doctest
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

import repom.config
from repom.config import RepomConfig, get_config, reset_config
from repom.errors import ConfigHookError, ConfigurationError

NAMES = ("REPOM_DATABASE_URL", "DATABASE_URL", "CONFIG_HOOK")
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, on sys.path as an application's would be; no settings."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    reset_config()
    yield tmp_path
    reset_config()
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


@pytest.fixture
def dotenv(place: Path) -> Write:
    def write(*lines: str) -> Path:
        path = place / ".env"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def hook(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write a module and set CONFIG_HOOK to a name in it."""

    def write(source: str, value: str = "settings:get_repom_config") -> None:
        header = "from repom.config import RepomConfig, get_config\n"
        (place / "settings.py").write_text(header + source, encoding="utf-8")
        monkeypatch.setenv("CONFIG_HOOK", value)

    return write


def hook_error(*parts: str) -> ConfigHookError:
    """The error of get_config(), whose message holds all of these parts in three lines at most."""
    with pytest.raises(ConfigHookError) as caught:
        get_config()
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert len(message.splitlines()) <= 3
    return caught.value


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "repom"]


# --- the URL ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "file", "url"),
    [
        (
            ["REPOM_DATABASE_URL=a", "DATABASE_URL=b"],
            ["REPOM_DATABASE_URL=c", "DATABASE_URL=d"],
            "a",
        ),
        (["DATABASE_URL=b"], ["REPOM_DATABASE_URL=c", "DATABASE_URL=d"], "c"),
        (["DATABASE_URL=b"], ["DATABASE_URL=d"], "b"),
        ([], ["DATABASE_URL=d", "REPOM_DATABASE_URL=c"], "c"),
        ([], ["DATABASE_URL=d"], "d"),
        (["REPOM_DATABASE_URL=", "DATABASE_URL=b"], [], "b"),
        (["REPOM_DATABASE_URL= "], ["REPOM_DATABASE_URL=c"], "c"),
        (["DATABASE_URL=b"], ["REPOM_DATABASE_URL=", "REPOM_DATABASE_URL"], "b"),
    ],
)
def test_precedence_of_the_sources(
    environment: list[str],
    file: list[str],
    url: str,
    dotenv: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """REPOM_DATABASE_URL beats DATABASE_URL, then the environment beats .env; empty is unset."""
    for line in environment:
        monkeypatch.setenv(*line.split("=", 1))
    dotenv(*file)
    assert RepomConfig().db_url == url


def test_argument_beats_every_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is passed to the constructor wins over the environment and over a class attribute."""

    class Fixed(RepomConfig):
        db_url = "sqlite:///of-the-class"

    monkeypatch.setenv("REPOM_DATABASE_URL", "sqlite:///of-the-environment")
    assert RepomConfig(db_url="sqlite:///given").db_url == "sqlite:///given"
    assert Fixed().db_url == "sqlite:///of-the-class"
    assert Fixed(db_url="sqlite:///given").db_url == "sqlite:///given"


def test_property_override_can_build_on_super(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass's db_url property decides, and sees what repom would have used."""

    class Tenant(RepomConfig):
        @property
        def db_url(self) -> str:
            return f"{super().db_url}_tenant"

    monkeypatch.setenv("DATABASE_URL", "sqlite:///shop")
    assert Tenant().db_url == "sqlite:///shop_tenant"
    assert Tenant(db_url="sqlite:///given").db_url == "sqlite:///given_tenant"


def test_url_is_read_once_for_each_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines of one config never meet two URLs, even if the environment changes between."""
    config = RepomConfig()
    monkeypatch.setenv("DATABASE_URL", "sqlite:///first")
    assert config.db_url == "sqlite:///first"
    monkeypatch.setenv("DATABASE_URL", "sqlite:///second")
    assert config.db_url == "sqlite:///first"


def test_dotenv_is_found_above_the_working_directory(
    place: Path, dotenv: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An application started in a sub-folder of its project finds the project's .env."""
    dotenv("DATABASE_URL=sqlite:///above")
    (place / "src").mkdir()
    monkeypatch.chdir(place / "src")
    assert RepomConfig().db_url == "sqlite:///above"


def test_dotenv_value_is_taken_literally(dotenv: Write) -> None:
    """A password with `$` or `${` in it arrives as it was written."""
    dotenv("HOME_IS=${HOME}", "DATABASE_URL='postgresql://u:a$b${HOME}c@h/d'")
    assert RepomConfig().db_url == "postgresql://u:a$b${HOME}c@h/d"


def test_dotenv_with_a_byte_order_mark(place: Path) -> None:
    """The BOM that some Windows editors write does not hide the first setting."""
    (place / ".env").write_bytes(b"\xef\xbb\xbfDATABASE_URL=sqlite:///bom\n")
    assert RepomConfig().db_url == "sqlite:///bom"


def test_unreadable_dotenv_is_an_error(place: Path) -> None:
    """A .env that cannot be decoded is not passed over: its settings may be the ones meant."""
    (place / ".env").write_bytes("DATABASE_URL=sqlite:///x".encode("utf-16"))
    with pytest.raises(ConfigurationError, match=r"\.env cannot be read: UnicodeDecodeError"):
        _ = RepomConfig().db_url


def test_reading_never_changes_the_environment(dotenv: Write) -> None:
    """Child processes and other libraries see the environment as it was."""
    dotenv("DATABASE_URL=sqlite:///x", "OTHER=1")
    before = dict(os.environ)
    _ = RepomConfig().db_url
    get_config()
    assert dict(os.environ) == before


def test_default_is_announced_once_with_its_absolute_path(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody writes to the SQLite default without a warning that says which file it is."""
    config = RepomConfig()
    assert config.db_url == config.db_url == RepomConfig().db_url
    path = place / "data" / "db.sqlite3"
    assert make_url(config.db_url).database == path.as_posix()
    [message] = warnings_of(caplog)
    assert str(path) in message
    assert "REPOM_DATABASE_URL" in message
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize("folder", ["a b", "50% ü", "x%20y"])
def test_default_survives_the_characters_of_a_path(
    folder: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The URL of the default leads SQLAlchemy back to the very file that was announced."""
    (place / folder).mkdir()
    monkeypatch.chdir(place / folder)
    url = make_url(RepomConfig().db_url)
    assert url.database == (place / folder / "data" / "db.sqlite3").as_posix()


def test_configured_url_is_not_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning is about the default alone."""
    monkeypatch.setenv("DATABASE_URL", "sqlite:///x")
    _ = RepomConfig().db_url
    assert warnings_of(caplog) == []


def test_require_url_turns_the_default_into_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In production a forgotten URL stops the start, and the message says how to give one."""

    class Production(RepomConfig):
        require_url = True

    for config in (RepomConfig(require_url=True), Production()):
        with pytest.raises(ConfigurationError) as caught:
            _ = config.db_url
        message = str(caught.value)
        assert "REPOM_DATABASE_URL" in message
        assert str(place) in message
        assert len(message.splitlines()) <= 3
    monkeypatch.setenv("DATABASE_URL", "sqlite:///x")
    assert Production().db_url == "sqlite:///x"


# --- the other values ------------------------------------------------------------------------


def test_defaults() -> None:
    """The values that the documentation promises."""
    config = RepomConfig()
    assert config.engine_kwargs == {
        "pool_size": 10,
        "max_overflow": 20,
        "pool_timeout": 30,
        "pool_recycle": 3600,
    }
    assert config.session_kwargs == {"expire_on_commit": False}
    assert config.databases == {}
    assert config.pgbouncer is False
    assert config.sqlite_begin is None


def test_kwargs_can_be_changed_without_harm() -> None:
    """`super().engine_kwargs` may be changed in place; no other config sees it."""

    class MyConfig(RepomConfig):
        @property
        def engine_kwargs(self) -> dict[str, Any]:
            kwargs = super().engine_kwargs
            kwargs["pool_size"] = 20
            return kwargs

        @property
        def session_kwargs(self) -> dict[str, Any]:
            kwargs = super().session_kwargs
            kwargs["autoflush"] = False
            return kwargs

    assert MyConfig().engine_kwargs["pool_size"] == 20
    assert RepomConfig().engine_kwargs["pool_size"] == 10
    assert MyConfig().session_kwargs == {"expire_on_commit": False, "autoflush": False}
    assert RepomConfig().session_kwargs == {"expire_on_commit": False}


def test_plain_attributes_can_be_overridden_without_super_init() -> None:
    """A subclass with a constructor of its own need not call repom's."""

    class MyConfig(RepomConfig):
        pgbouncer = True
        sqlite_begin = "IMMEDIATE"

        def __init__(self) -> None:
            self.stage = "production"

        @property
        def databases(self) -> dict[str, str]:
            return {"reports": "sqlite:///reports"}

    config = MyConfig()
    assert (config.pgbouncer, config.sqlite_begin, config.require_url) == (True, "IMMEDIATE", False)
    assert config.databases["reports"] == "sqlite:///reports"


def test_repr_hides_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config in a log or in a traceback shows no password, wherever its URL came from."""
    url = "postgresql://app:hush@localhost/shop"

    class Fixed(RepomConfig):
        db_url = url

    monkeypatch.setenv("DATABASE_URL", url)
    found = RepomConfig()
    assert found.db_url == url
    for config in (RepomConfig(db_url=url), Fixed(), found):
        assert repr(config) == f"{type(config).__name__}(db_url='{url.replace('hush', '***')}')"


def test_repr_reads_nothing(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A repr neither warns nor raises: before the URL is read it says so little."""

    class Computed(RepomConfig):
        @property
        def db_url(self) -> str:
            raise AssertionError("the repr must not call this")

    (place / ".env").write_bytes(b"\xff\xfe")
    assert repr(RepomConfig(require_url=True)) == "RepomConfig(db_url=...)"
    assert repr(Computed(db_url="sqlite:///x")) == "Computed(db_url=...)"
    assert warnings_of(caplog) == []


def test_nothing_is_read_at_import(place: Path) -> None:
    """Importing repom.config touches no setting: a broken .env and hook do not matter yet."""
    (place / ".env").write_bytes(b"\xff\xfe")
    subprocess.run(
        [sys.executable, "-c", "import repom.config"],
        env={**os.environ, "CONFIG_HOOK": "no such hook"},
        check=True,
    )


def test_examples_of_the_docstrings() -> None:
    """The examples in the docstrings do what they show."""
    results = doctest.testmod(repom.config)
    assert results.attempted > 0
    assert results.failed == 0


# --- CONFIG_HOOK -----------------------------------------------------------------------------

HOOK = """
class MyConfig(RepomConfig):
    db_url = "sqlite:///of-the-hook"

calls = []

def get_repom_config():
    calls.append(1)
    return MyConfig()
"""


def test_without_a_hook_the_config_is_plain() -> None:
    """No CONFIG_HOOK is no error."""
    assert type(get_config()) is RepomConfig


def test_hook_of_the_environment(hook: Callable[..., None]) -> None:
    """CONFIG_HOOK names the function; its config is kept, so it is called once."""
    hook(HOOK)
    assert get_config().db_url == "sqlite:///of-the-hook"
    assert get_config() is get_config()
    assert sys.modules["settings"].calls == [1]
    reset_config()
    get_config()
    assert sys.modules["settings"].calls == [1, 1]


def test_hook_of_dotenv(
    hook: Callable[..., None], dotenv: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CONFIG_HOOK in .env works alike, and the one of the environment beats it."""
    hook(HOOK)
    dotenv("CONFIG_HOOK=missing:function")
    assert get_config().db_url == "sqlite:///of-the-hook"
    monkeypatch.delenv("CONFIG_HOOK")
    dotenv("CONFIG_HOOK=settings:get_repom_config")
    reset_config()
    assert get_config().db_url == "sqlite:///of-the-hook"


def test_hook_in_a_package(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module may lie in a package, and a class is as good as a function."""
    (place / "shop").mkdir()
    (place / "shop" / "settings.py").write_text(
        "from repom.config import RepomConfig\nclass Config(RepomConfig): db_url = 'sqlite:///s'\n"
    )
    monkeypatch.setenv("CONFIG_HOOK", "shop.settings:Config")
    assert get_config().db_url == "sqlite:///s"


def test_threads_share_one_config(hook: Callable[..., None]) -> None:
    """Threads that ask at the same time get the same object from one call of the hook."""
    hook(HOOK.replace("calls.append(1)", "calls.append(1); __import__('time').sleep(0.05)"))
    found: list[RepomConfig] = []
    threads = [threading.Thread(target=lambda: found.append(get_config())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
    assert sys.modules["settings"].calls == [1]


@pytest.mark.parametrize(
    "value",
    ["settings.get", "settings:", ":get", "a:b:c", "my settings:get", "settings:a.b", "1:x"],
)
def test_malformed_hook(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value of another form is quoted, with where it was found and the form to write."""
    monkeypatch.setenv("CONFIG_HOOK", value)
    hook_error(f"CONFIG_HOOK={value} (set in the environment)", "package.module:function")


def test_error_names_the_dotenv_file(dotenv: Write) -> None:
    """A reader is led to the file that holds the wrong value."""
    path = dotenv("CONFIG_HOOK=nonsense")
    hook_error(f"(set in {path})")


def test_url_put_into_the_hook_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL in the wrong variable does not bring its password into the message."""
    monkeypatch.setenv("CONFIG_HOOK", "postgresql://app:hush@localhost/shop")
    assert "hush" not in str(hook_error("CONFIG_HOOK (set in the environment)"))


@pytest.mark.parametrize("value", ["nowhere:get", "nowhere.settings:get", "json.nowhere:get"])
def test_module_not_found(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing module is told apart from a failing one, and sys.path is named."""
    monkeypatch.setenv("CONFIG_HOOK", value)
    error = hook_error(f"CONFIG_HOOK={value}", "not on sys.path", "nowhere", "PYTHONPATH")
    assert isinstance(error.__cause__, ModuleNotFoundError)
    assert "It is in the working directory" not in str(error)


def test_module_of_that_name_elsewhere(hook: Callable[..., None]) -> None:
    """A file that only has the last part of the name is not offered as the module."""
    hook(HOOK, "json.settings:get_repom_config")
    assert "working directory" not in str(hook_error("not on sys.path: json.settings"))


@pytest.mark.parametrize("value", ["settings:get_repom_config", "settings.sub:get"])
def test_module_in_a_working_directory_off_sys_path(
    value: str, place: Path, hook: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most common reason, a working directory off sys.path, is told with its cure."""
    hook(HOOK, value)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(place))])
    hook_error("It is in the working directory", f"PYTHONPATH={place}")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("1 / 0", "settings raised ZeroDivisionError."),
        ("def f(:", "settings raised SyntaxError."),
        ("import not_installed", "settings raised ModuleNotFoundError for not_installed."),
        ("raise ModuleNotFoundError", "settings raised ModuleNotFoundError."),
    ],
)
def test_module_that_raises(source: str, said: str, hook: Callable[..., None]) -> None:
    """An error of the module itself, a missing import too, is chained and not called a typo."""
    hook(source)
    error = hook_error(f"cannot be imported: {said}")
    assert type(error.__cause__).__name__ in said


def test_error_is_not_remembered(hook: Callable[..., None]) -> None:
    """After the cause is gone the next call succeeds."""
    hook("1 / 0")
    hook_error("ZeroDivisionError")
    hook(HOOK + "# another size, so that the cached bytecode is not taken for it")
    assert get_config().db_url == "sqlite:///of-the-hook"


def test_missing_attribute(hook: Callable[..., None]) -> None:
    """A misspelt function is answered with the names that come close."""
    hook(HOOK, "settings:get_repom_confg")
    hook_error("no attribute of the module settings", "Did you mean get_repom_config")


def test_missing_attribute_like_no_other(hook: Callable[..., None]) -> None:
    """With nothing close by, the message says to define it."""
    hook(HOOK, "settings:zzz")
    hook_error("no attribute of the module settings", "Define zzz() there.")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("get_repom_config = RepomConfig()", "an object of type RepomConfig"),
        ("def get_repom_config(stage): ...", "needs arguments"),
        ("def get_repom_config(*, stage): ...", "needs arguments"),
        ("async def get_repom_config(): ...", "is an async function"),
        ("def get_repom_config(): ...", "returned an object of type NoneType"),
        ("get_repom_config = dict", "returned an object of type dict"),
        ("def get_repom_config(): return RepomConfig", "Return an object: RepomConfig()."),
        ("def get_repom_config(): 1 / 0", "raised ZeroDivisionError"),
        ("def get_repom_config(): return get_config()", "calls get_config()"),
        ("get_config()", "calls get_config()"),
    ],
)
def test_unusable_hook(source: str, said: str, hook: Callable[..., None]) -> None:
    """Every other way of being no hook is told by its name, in one error."""
    hook(source)
    hook_error("CONFIG_HOOK=settings:get_repom_config (set in the environment)", said)


def test_text_of_the_hooks_own_error_is_left_to_the_cause(hook: Callable[..., None]) -> None:
    """The text of a foreign error may hold a password: it is chained, not quoted."""
    hook("def get_repom_config(): raise ValueError('postgresql://app:hush@h/d')")
    error = hook_error("raised ValueError")
    assert "hush" not in str(error)
    assert isinstance(error.__cause__, ValueError)

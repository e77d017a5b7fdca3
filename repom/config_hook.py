"""From the value of `CONFIG_HOOK` to what its function returns, each step with its own error."""

import difflib
import importlib
import importlib.machinery
import inspect
import os
import re
from collections.abc import Callable
from typing import TypeVar

from repom.errors import ConfigHookError

T = TypeVar("T")


class Hook:
    """A function that is named by a setting.

    Args:
        value: "package.module:function".
        source: where it was set, for messages.
    """

    def __init__(self, value: str, source: str) -> None:
        self.value = value
        self.source = source

    def error(self, problem: str, remedy: str) -> ConfigHookError:
        """The error that says what is wrong with the hook, and what to write."""
        # What looks like a URL was put here by mistake, and may hold a password.
        value = "" if re.search("@|://", self.value) else f"={self.value}"
        return ConfigHookError(f"CONFIG_HOOK{value} (set in {self.source}) {problem}.\n{remedy}")

    def call(self, expected: type[T]) -> T:
        """Call the function, which must return an instance of `expected`.

        Raises:
            ConfigHookError: it cannot be imported or called, or returns something else.
        """
        function = self._function()
        try:
            result = function()
        except ConfigHookError:
            raise  # of a get_config() inside the hook: it says what is wrong already
        except Exception as error:
            raise self.error(
                f"raised {type(error).__name__}", "Its own error is the cause shown with this one."
            ) from error
        if isinstance(result, expected):
            return result
        if inspect.iscoroutine(result):
            result.close()  # or Python warns that it was never awaited, which is not the point
            raise self.error(
                "is an async function", "Write it with `def`: it is called by sync code too."
            )
        if isinstance(result, type) and issubclass(result, expected):
            raise self.error(
                f"returned the class {result.__name__}", f"Return an object: {result.__name__}()."
            )
        raise self.error(
            f"returned an object of type {type(result).__name__}",
            f"Return an instance of {expected.__name__} or of a subclass.",
        )

    def _function(self) -> Callable[[], object]:
        """The function itself, known to be callable without arguments."""
        names = re.fullmatch(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)", self.value)
        if names is None:
            raise self.error(
                "is not of the form package.module:function",
                "Write, for example, CONFIG_HOOK=settings:get_repom_config.",
            )
        module_name, name = names.groups()
        module = self._module(module_name)
        try:
            function: Callable[[], object] = getattr(module, name)
        except AttributeError as error:
            close = difflib.get_close_matches(name, dir(module))
            raise self.error(
                f"names no attribute of the module {module_name}",
                f"Did you mean {' or '.join(close)}?" if close else f"Define {name}() there.",
            ) from error
        if not callable(function):
            raise self.error(
                f"is not a function, but an object of type {type(function).__name__}",
                "Name a function without parameters that returns the config.",
            )
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            raise self.error(
                "needs arguments", "It is called with none: give each a default."
            ) from error
        except ValueError:
            pass  # a builtin without a signature: the call will tell
        return function

    def _module(self, name: str) -> object:
        try:
            return importlib.import_module(name)
        except ConfigHookError:
            raise  # of a get_config() at the module's top level
        except Exception as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            # Only the module itself or a package above it, not what the module imports.
            if missing and f"{name}.".startswith(f"{missing}."):
                raise self.error(
                    f"names a module that is not on sys.path: {missing}", _where_is(missing)
                ) from error
            detail = f" for {missing}" if missing else ""
            raise self.error(
                f"cannot be imported: {name} raised {type(error).__name__}{detail}",
                "Its own error is the cause shown with this one.",
            ) from error


def _where_is(module: str) -> str:
    """What to do about a module that cannot be found."""
    folder = os.getcwd()
    # Of a dotted name, find_spec() would look for the last part alone.
    if "." not in module and importlib.machinery.PathFinder.find_spec(module, [folder]):
        return (
            f"It is in the working directory {folder}, which is not on sys.path: "
            f"set PYTHONPATH={folder}, or install the application."
        )
    return "Write it as `import` would; set PYTHONPATH to its folder, or install the application."

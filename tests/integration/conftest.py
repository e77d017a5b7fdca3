"""Databases with an empty table of notes; a file that has its own takes that."""

from tests.middleware.conftest import database, deferring, deferring_url

__all__ = ["database", "deferring", "deferring_url"]

"""Databases with an empty table of notes."""

from tests.middleware.conftest import database, deferring, deferring_url

__all__ = ["database", "deferring", "deferring_url"]

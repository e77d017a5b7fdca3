"""One SQLAlchemy transaction for every ASGI request, reachable from any depth of the code."""

from repom.atomic_block import atomic
from repom.config import RepomConfig, get_config
from repom.conflicts import is_conflict
from repom.current import (
    current_scope,
    current_session,
    current_sync_session,
    on_commit,
    on_rollback,
)
from repom.database import Database
from repom.database_cache import DatabaseCache
from repom.registry import get_database
from repom.scope import SessionScope
from repom.transaction import (
    run_sync_transaction,
    run_transaction,
    session_scope,
    sync_session_scope,
)

__all__ = [
    "Database",
    "DatabaseCache",
    "RepomConfig",
    "SessionScope",
    "atomic",
    "current_scope",
    "current_session",
    "current_sync_session",
    "get_config",
    "get_database",
    "is_conflict",
    "on_commit",
    "on_rollback",
    "run_sync_transaction",
    "run_transaction",
    "session_scope",
    "sync_session_scope",
]

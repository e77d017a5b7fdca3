"""The events of a session, which SQLAlchemy would look for one by one.

For every event that happens first in a session, its `dispatch` is asked for an attribute that it
does not have yet. That is an exception, `__getattr__`, and then a listener which is the same for
all sessions of the class, and calls those that are registered for the class. A SELECT has eleven of
them, an INSERT sixteen.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

#: The events of nearly every unit of work.
_USUAL = (
    *("after_transaction_create", "after_begin", "do_orm_execute", "loaded_as_persistent"),
    *("before_attach", "after_attach", "transient_to_pending"),
    *("before_flush", "after_flush", "pending_to_persistent", "after_flush_postexec"),
    *("before_commit", "after_commit", "after_transaction_end"),
    *("persistent_to_detached", "deleted_to_detached"),
    *("pending_to_transient", "persistent_to_transient"),
)

_listeners: dict[type[Session], list[tuple[str, Any]]] = {}


def expect_usual_events(session: Session) -> None:
    """Give the new `session` what it will look for.

    Unless its class has asked for its events already, as to listen to its own.
    """
    if "dispatch" in session.__dict__:
        return
    dispatch: Any = session.dispatch
    known = _listeners.get(type(session))
    if known is None:
        _listeners[type(session)] = [(name, getattr(dispatch, name)) for name in _USUAL]
    else:
        for name, listener in known:
            setattr(dispatch, name, listener)

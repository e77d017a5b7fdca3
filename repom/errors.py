"""Every exception of repom, one class per meaning.

A message says what happened, why, and what to write instead. Passwords never appear in one:
URLs are always rendered with the password hidden.
"""


class RepomError(Exception):
    """Root of everything repom raises on its own account.

    Errors of SQLAlchemy and of the drivers pass through unchanged unless repom knows more
    than they do; then they are the `__cause__`.
    """


# --- configuration: known before the first statement -------------------------------------


class ConfigurationError(RepomError):
    """The configuration is incomplete or contradicts itself."""


class ConfigHookError(ConfigurationError):
    """`CONFIG_HOOK` names something that cannot be imported, called, or used as a config."""


class DatabaseURLError(ConfigurationError, ValueError):
    """A database URL cannot be parsed, or cannot be converted between sync and async."""


class MissingDriverError(ConfigurationError, ImportError):
    """The driver that a URL names is not installed."""


class UnknownDatabaseError(ConfigurationError, LookupError):
    """No database is configured under this name."""


class TwoPhaseUnavailableError(ConfigurationError):
    """`two_phase=True`, where the driver or the server cannot prepare a transaction."""


class DatabaseFileError(ConfigurationError, OSError):
    """The SQLite file, or its folder, cannot be created or written."""


# --- scopes and sessions: how repom is called ---------------------------------------------


class ScopeError(RepomError, RuntimeError):
    """repom was called from a place where it cannot do what was asked."""


class NoScopeError(ScopeError):
    """A session was asked for, and no unit of work is open here."""


class ScopeClosedError(ScopeError):
    """The unit of work this code belongs to has ended."""


class WrongThreadError(ScopeError):
    """The async session was asked for in a thread that runs no event loop."""


class WrongEventLoopError(ScopeError):
    """The async session was asked for on another event loop than the one it belongs to."""


class MixedSessionsError(ScopeError):
    """One scope was asked for both the sync and the async session of a database."""


class DurableAtomicError(ScopeError):
    """`atomic(durable=True)` was entered inside an open unit of work."""


class InnerCommitError(ScopeError):
    """Code that does not own the unit of work tried to end its transaction.

    By `commit()` under `inner_commits="forbid"`, or by COMMIT, ROLLBACK or BEGIN as text.
    """


class ReadOnlyError(ScopeError):
    """A unit of work that was opened with `read_only` tried to write, and nothing was written.

    The refusal of the database is the `__cause__`.
    """


class InvalidResponseError(ScopeError):
    """The application's response breaks a rule of ASGI or HTTP, found before COMMIT."""


class OpenCursorError(ScopeError):
    """A statement would take the rows that a stream has not read yet (MySQL and MariaDB)."""


class WouldDeadlockError(ScopeError):
    """A scope would wait for a lock that an enclosing scope of its own context holds."""


# --- transactions: what the database did ----------------------------------------------------


class TransactionError(RepomError):
    """The transaction did not end as it was asked to."""


class DatabaseUnreachableError(TransactionError, ConnectionError):
    """No connection could be made: server down, name unknown, or login refused."""


class TransactionAbortedError(TransactionError):
    """COMMIT was asked for, but the database had already aborted the transaction.

    An earlier statement failed and its error was swallowed; that error is the `__cause__`.
    Not a `SQLAlchemyError`, so that a handler registered for those does not answer for it.
    """


class CommitOutcomeUnknown(TransactionError):
    """COMMIT may or may not have happened: the connection was lost while it was in flight.

    Or the server itself does not know, and says so. Not a `SQLAlchemyError`: a handler registered
    for those would claim what nobody knows. Never retried by repom.
    """


class PartialCommitError(TransactionError):
    """One database of a scope has committed, and a later one failed to.

    Attributes:
        committed: names of the databases whose COMMIT had succeeded.
        failed: name of the database whose COMMIT failed; its error is the `__cause__`.
        rolled_back: names of the databases that were rolled back after it.
    """

    def __init__(
        self, message: str, *, committed: list[str], failed: str, rolled_back: list[str]
    ) -> None:
        super().__init__(message)
        self.committed = committed
        self.failed = failed
        self.rolled_back = rolled_back


class CommitPendingError(TransactionError):
    """A two-phase commit is decided, and done, but not every database has confirmed its part.

    What is pending is kept by its database, with its locks, until `python -m repom.recovery`
    commits it.

    Attributes:
        committed: names of the databases that have confirmed their COMMIT.
        pending: names of the others; the error of the first is the `__cause__`.
        unit: the name of the unit of work in the ids of its prepared transactions.
    """

    def __init__(
        self, message: str, *, committed: list[str], pending: list[str], unit: str
    ) -> None:
        super().__init__(message)
        self.committed = committed
        self.pending = pending
        self.unit = unit


#: After one of these, something of the transaction may be in a database.
MAY_BE_COMMITTED = (CommitOutcomeUnknown, CommitPendingError, PartialCommitError)


class ConcurrentSessionUse(TransactionError):
    """Two tasks used one session in a way that queueing cannot make safe.

    Where a change would be lost, the transaction is not committed, whoever swallows this.
    """


# --- tests ----------------------------------------------------------------------------------


class SharedConnectionError(RepomError):
    """The connection that the sessions of a test share cannot be used, or not any more.

    The test has ended, or something has closed the connection or ended its transaction.
    """

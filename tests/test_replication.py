"""What servers tell of their replication; replicas do so in tests/cluster/test_readers.py."""

from repom import Database
from repom.replication import ask, ask_async, replication_of
from tests.support.reader import execute


async def test_positions(postgres_url: str) -> None:
    """They grow with what is committed, and a server that is no replica has what it writes."""
    database = Database(postgres_url)
    replication = replication_of(database.url)
    assert replication is not None
    execute(postgres_url, "CREATE TABLE item (id INTEGER)")
    before = await ask_async(database, replication.written)
    execute(postgres_url, "INSERT INTO item VALUES (1)")
    flushed = await ask_async(database, replication.flushed)
    replayed = await ask_async(database, replication.replayed)
    assert before < flushed <= replayed
    assert ask(database, replication.written, is_async=False) >= replayed
    await database.dispose()


def test_who_does_not_tell(mysql_url: str) -> None:
    """Nothing is asked of it but whether it answers."""
    assert replication_of(Database(mysql_url).url) is None

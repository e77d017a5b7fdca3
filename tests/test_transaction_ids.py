"""The names of prepared transactions."""

import pytest
from sqlalchemy.engine import make_url

from repom.transaction_ids import TransactionId, fingerprint, new_unit


def known(*urls: str) -> str:
    return fingerprint(map(make_url, urls))


def test_an_id_is_read_as_it_was_written() -> None:
    """And is short enough for MySQL, which takes 64 bytes."""
    written = TransactionId(new_unit(), 123, known("mysql://h/d"))
    assert TransactionId.parse(str(written)) == written
    assert len(str(written)) <= 64


@pytest.mark.parametrize("text", ["", "_sa_0123", "repom-1-2-3", "repom-" + 24 * "a" + "-0-x"])
def test_ids_of_others(text: str) -> None:
    assert TransactionId.parse(text) is None


def test_units_differ() -> None:
    assert new_unit() != new_unit()


SHOP, BILLING = "postgresql://app:secret@pg/shop", "mysql://app@my/billing"


@pytest.mark.parametrize(
    "same",
    [
        [BILLING, SHOP],
        [SHOP, BILLING, SHOP],
        ["postgresql+psycopg://admin@pg/shop", "mariadb+pymysql://my/billing"],
    ],
)
def test_the_same_databases(same: list[str]) -> None:
    """In whatever order, with whatever user and driver."""
    assert known(*same) == known(SHOP, BILLING)


@pytest.mark.parametrize(
    "other",
    [
        [SHOP],
        [SHOP, BILLING, "sqlite:///x"],
        [SHOP.replace("@pg", "@pg2"), BILLING],
        [SHOP.replace("@pg", "@pg:5433"), BILLING],
        ["postgresql://app@/shop?host=pg:1&host=pg2:1", BILLING],
    ],
)
def test_other_databases(other: list[str]) -> None:
    assert known(*other) != known(SHOP, BILLING)

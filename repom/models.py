"""The declarative `Base`: names for every constraint, server defaults after flush, `to_dict()`.

Using it is a choice; repom's sessions work with any mapped class.
"""

from typing import Any

from sqlalchemy import MetaData, event, inspect
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase, InstanceState, Mapper

NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
"""Names by which a migration can find and drop what it has to (SQLAlchemy: "Configuring
Constraint Naming Conventions").

`column_0_N_name` is all columns, not the first: two composite constraints of one table that
start with the same column get two names. A CHECK is named by its author: SQLAlchemy refuses
`CheckConstraint("price > 0")` here and takes `CheckConstraint("price > 0", name="positive")`.
"""


class Base(AsyncAttrs, DeclarativeBase):
    """Declarative base class whose objects can be used after the flush without further IO.

    Server defaults and `onupdate` expressions are read back by the flush itself
    (`eager_defaults`), because reading them later is a lazy load, which async code cannot do;
    `__mapper_args__ = {"eager_defaults": False}` turns that off for a class. What is lazy all
    the same is awaited: `await user.awaitable_attrs.posts`.

    A base of your own is an abstract one: with `MappedAsDataclass`, or with another `metadata`
    (give it `NAMING_CONVENTION`).

    >>> from sqlalchemy.orm import Mapped, MappedAsDataclass, mapped_column
    >>> class DataclassBase(MappedAsDataclass, Base):
    ...     __abstract__ = True
    ...     metadata = MetaData(naming_convention=NAMING_CONVENTION)
    >>> class City(DataclassBase):
    ...     __tablename__ = "cities"
    ...     code: Mapped[str] = mapped_column(primary_key=True)
    ...     name: Mapped[str]
    >>> City(code="fi-hki", name="Helsinki").to_dict()
    {'code': 'fi-hki', 'name': 'Helsinki'}
    """

    metadata = MetaData(naming_convention=NAMING_CONVENTION)

    def to_dict(self) -> dict[str, Any]:
        """The loaded column attributes by attribute name. Never IO, in no state of the object.

        Deferred, expired and never set attributes are left out, and so is all that is no
        column attribute: relationships, hybrids, synonyms, composites (their columns are in).
        Values are not copied. Nothing is filtered: let a response model drop a password hash.
        """
        state: InstanceState[Any] = inspect(self)
        loaded, columns = state.dict, state.mapper.column_attrs
        return {column.key: loaded[column.key] for column in columns if column.key in loaded}

    def __repr__(self) -> str:
        """The class and the primary key, `None` before there is one. Never IO."""
        state: InstanceState[Any] = inspect(self)
        keys = [state.mapper.get_property_by_column(c).key for c in state.mapper.primary_key]
        # The identity outlives expiry and detachment, where the attributes would be loaded again.
        values = state.identity or [state.dict.get(key) for key in keys]
        shown = ", ".join(f"{key}={value!r}" for key, value in zip(keys, values, strict=True))
        return f"{type(self).__name__}({shown})"


# An event, because `__mapper_args__` of Base would be replaced, not merged, by those of a
# subclass that only wants to say `polymorphic_on` or `version_id_col`.
@event.listens_for(Base, "after_mapper_constructed", propagate=True)
def _read_back_server_defaults(mapper: Mapper[Any], _class: type[Any]) -> None:
    if mapper.eager_defaults == "auto":
        mapper.eager_defaults = True

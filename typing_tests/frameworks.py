"""The middleware takes the applications of all frameworks, each with ASGI types of its own.

These files are checked by mypy --strict and pyright (`make lint`), and not run.
"""

import falcon.asgi
from blacksheep import Application
from litestar import Litestar
from litestar.di import Provide
from litestar.middleware import DefineMiddleware
from quart import Quart
from sanic import Sanic
from starlette.applications import Starlette
from starlette.middleware import Middleware

from repom import Database
from repom.middleware import DatabaseSessionMiddleware
from repom.middleware.blacksheep import raise_failed_commit as of_blacksheep
from repom.middleware.falcon import RaiseFailedCommit
from repom.middleware.litestar import provide_session
from repom.middleware.quart import raise_failed_commit as of_quart

database = Database("sqlite://")

Starlette(middleware=[Middleware(DatabaseSessionMiddleware, database)])
DatabaseSessionMiddleware(Starlette(), database)

litestar = Litestar(
    middleware=[DatabaseSessionMiddleware, DefineMiddleware(DatabaseSessionMiddleware)],
    dependencies={"session": Provide(provide_session)},
)
DatabaseSessionMiddleware(litestar, database)

quart = Quart(__name__)
quart.before_request(of_quart)
quart.asgi_app = DatabaseSessionMiddleware(quart.asgi_app)  # type: ignore[method-assign]

DatabaseSessionMiddleware(falcon.asgi.App(middleware=[RaiseFailedCommit()]))

blacksheep = Application()
blacksheep.middlewares.append(of_blacksheep)
DatabaseSessionMiddleware(blacksheep)

DatabaseSessionMiddleware(Sanic("app"))
# Django's `get_asgi_application()` has no types.

"""Applications in which the middleware is not told when the server starts and stops.

Litestar does not hand the lifespan to the middlewares of its list, and Django has none.
"""

from repom import get_database
from tests.frameworks.apps import django as of_django
from tests.frameworks.apps import litestar as of_litestar

django = of_django.make(get_database())
litestar = of_litestar.make(get_database())

"""Serve the demo: `python -m examples.articles`, or `make demo`."""

import asyncio
import errno
import logging
import os
import socket
import sys

import uvicorn

from repom import get_database
from repom.errors import RepomError

DEFAULT_PORT = 8000
MAX_PORT = 65535


def main() -> None:
    """Serve until Ctrl-C; what stops the start is said in a sentence, with exit code 1."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)-8s  %(message)s")
    # The page asks every two seconds, which is no news.
    logging.getLogger("uvicorn.access").addFilter(lambda r: '"GET /database ' not in r.getMessage())
    # Taken here and handed over: uvicorn would look for it only after starting the application.
    listener = listen(chosen_port())
    try:
        database = get_database()
        asyncio.run(database.ping())
    except RepomError as error:
        sys.exit(f"{error}")
    print(f"The demo is at http://127.0.0.1:{listener.getsockname()[1]} (Ctrl-C ends it).")
    print(f"Its articles are in {database!r}.", flush=True)
    server = uvicorn.Server(uvicorn.Config("examples.articles.app:app", log_level="info"))
    try:
        server.run([listener])
    except KeyboardInterrupt:
        return
    if not server.started:
        sys.exit(1)


def chosen_port() -> int:
    """The port that `PORT` names; 0 is any that is free."""
    value = os.environ.get("PORT", "").strip() or str(DEFAULT_PORT)
    if not (value.isascii() and value.isdigit() and int(value) <= MAX_PORT):
        sys.exit(f"PORT={value} is not a port. Choose one: PORT={DEFAULT_PORT} make demo")
    return int(value)


def listen(port: int) -> socket.socket:
    """Take the port."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        other = f"Choose another: PORT={max(port, DEFAULT_PORT) % MAX_PORT + 1} make demo"
        if error.errno == errno.EADDRINUSE:
            sys.exit(f"Port {port} is in use. {other}")
        sys.exit(f"Port {port} cannot be used: {error.strerror}. {other}")


if __name__ == "__main__":
    main()

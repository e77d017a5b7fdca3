"""The demo: articles that are written, read and published.

`make demo` serves it. A request passes `routes`, then `service`, then `repository`, and only the
last of them asks for a session. `trouble` provokes what goes wrong in real life, and `outside`
reads what the database holds then.
"""

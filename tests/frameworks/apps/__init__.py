"""One application, written in the idiom of each framework: a module for each.

`make(database)` returns it, behind the middleware. Its endpoints are of POST:

| path | what it does |
|---|---|
| /created | writes, answers 201 |
| /returned | writes, answers 404 by itself |
| /raised | writes, raises the framework's own error, which answers 403 |
| /handled | writes, raises what has a handler, which answers 422 |
| /crash | writes, raises what has none |
| /refused, /doomed | writes what COMMIT refuses, wants to answer 201 |
| /sync, /sync-refused | the same in sync code |
| /background | writes, and lets something be written after the response |
| /stream, /stream-broken, /stream-refused | bodies that write |
| /export | a body read from a cursor |

and the WebSocket `/ws` writes each message in a transaction of its own, then echoes it.
"""

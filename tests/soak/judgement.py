"""Whether what a client knows and what is in the database agree."""

from collections.abc import Mapping

from tests.soak.kinds import BUSY, NO_ANSWER, OVERDUE, Presence, afterwards
from tests.soak.layers import LIMIT
from tests.soak.load import Answer
from tests.soak.tables import ROWS

_ALLOWED = {
    Presence.ALL: {ROWS},
    Presence.NONE: {0},
    Presence.EITHER: {0, ROWS},
}


def disagreements(answer: Answer, found: Mapping[str, int], *, at_once: bool = False) -> list[str]:
    """What is wrong about an answer.

    Args:
        found: how many entries of each part are committed.
        at_once: the response has just arrived, so background tasks may still be at work.
    """
    request, seen = answer
    problems = []
    for part, rule in request.kind.parts.items():
        presence = rule(seen)
        if at_once and rule is afterwards:
            continue
        count = found.get(part, 0)
        if count not in _ALLOWED[presence]:
            problems.append(f"{count} of {ROWS} rows of {part!r}, where {presence.value} are right")
    problems += [f"rows of {part!r}" for part in found.keys() - request.kind.parts.keys()]
    return [f"{request}: {seen} {seen.error}, but {problem}" for problem in problems]


def surprises(answer: Answer) -> list[str]:
    """What is no answer of that application, or not the whole of it."""
    request, seen = answer
    kind = request.kind
    limited = LIMIT in request.headers
    possible = kind.statuses | ({OVERDUE} if limited else set())
    problems = []
    if seen.status == BUSY and BUSY not in possible:
        # Which no application can exclude.
        if seen.complete and seen.body != b"deadlock":
            problems.append(f"not even tried: {seen.body!r}")
    elif seen.status is not None and seen.status not in possible:
        problems.append(f"{kind.statuses} are possible")
    if seen.complete and not seen.is_error:
        if kind.breaks:
            problems.append("the body had to break")
        if kind.body is not None and seen.body != kind.body:
            problems.append(f"the body is {seen.body!r}")
    if seen.error == NO_ANSWER:
        problems.append("there was time enough")
    # uvicorn closes a connection on which a background task has failed, whatever goes on there.
    if not (seen.complete or request.manners.leaves or kind.breaks or limited or seen.reused):
        problems.append("nobody had a reason to break it off")
    return [f"{request}: {seen} {seen.error}, but {problem}" for problem in problems]

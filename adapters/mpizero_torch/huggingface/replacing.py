"""Methods of other people's classes that do something else in some cases."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_DONE: set[tuple[type, str]] = set()


def replace(owner: type, name: str, method: Callable[..., Any]) -> None:
    """Let ``owner.name(self, ...)`` be ``method(what it was, self, ...)``; once only."""
    if (owner, name) in _DONE:
        return
    _DONE.add((owner, name))
    before = getattr(owner, name)

    @functools.wraps(before)
    def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(before, self, *args, **kwargs)

    setattr(owner, name, replaced)

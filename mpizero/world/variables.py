"""torchrun's variables, by which programs ask who they are, as this rank's launcher or MPI says.

Programs read RANK and WORLD_SIZE before they start anything, and take themselves for alone where
there are none: every rank would train a copy. What this process has set is noted in a variable
beside them, so that it can be told from what somebody else has set, in child processes as well.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from mpizero.errors import LaunchError

# By these two torch finds the store of a job that torchrun has started.
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")

# Of these there is one truth.
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")

_NOTE = "MPIZERO_HAS_SET"

# What torchrun alone sets: it may start, from a rank, ranks that get the same numbers.
_TORCHRUNS = "TORCHELASTIC_RUN_ID"


def own(environ: Mapping[str, str]) -> dict[str, str]:
    """What a rank has set itself, all of which still stands; nothing, if another has changed it."""
    pairs = (pair.partition("=") for pair in environ.get(_NOTE, "").split(";"))
    noted = {name: value for name, equals, value in pairs if equals}
    changed = any(environ.get(name, "") != value for name, value in noted.items())
    noted.pop(_TORCHRUNS, None)
    return {} if changed else noted


def others(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what a rank has set itself."""
    mine = own(environ)
    return {name: value for name, value in environ.items() if name not in mine}


def say(
    environ: MutableMapping[str, str], told: Mapping[str, str], who: str, function: str
) -> None:
    """Set the variables; those that a rank has set before are set anew.

    ``who``: by whose word they are ``told``. Raises LaunchError, and sets nothing, where somebody
    else has set other ones than that; an address may be anybody's.
    """
    given = others(environ)
    known = [name for name in _PLACE if name in given and name in told]
    wrong = [name for name in known if given[name] != told[name]]
    if wrong:
        raise LaunchError(
            f"{function}: {_listed(given, wrong)} in the environment, but {who} says "
            f"{_listed(told, wrong)}: what reads these variables would take this process for "
            "another rank. If they are left over from something else, unset them before the "
            "launch; if another launcher has set them, start the ranks with one of the two alone."
        )
    for name in own(environ):
        del environ[name]
    new = {name: value for name, value in told.items() if name not in given}
    if not new.keys() >= {*ADDRESS}:  # half an address is none
        new = {name: value for name, value in new.items() if name not in ADDRESS}
    environ.update(new)
    noted = {**new, _TORCHRUNS: environ.get(_TORCHRUNS, "")}
    environ[_NOTE] = ";".join(f"{name}={value}" for name, value in noted.items())


def _listed(values: Mapping[str, str], names: list[str]) -> str:
    return ", ".join(f"{name}={values[name]}" for name in names)

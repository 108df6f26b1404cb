"""What commands write where they are told to: over nothing but what they have written before."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import click

from mpizero import outputs
from mpizero.errors import ArgumentError
from mpizero.outputs import IsOurs


def check(path: Path | None, is_ours: IsOurs, command: str, option: str) -> None:
    """End the command, before its work, if it must not write there in the end."""
    try:
        if path is not None:
            outputs.refuse_foreign(path, is_ours, command, option)
    except ArgumentError as error:
        raise click.ClickException(str(error)) from error


def write(path: Path, data: bytes, is_ours: IsOurs, command: str, option: str) -> None:
    """Write it, or end the command if that must not be."""
    try:
        outputs.write(path, data, is_ours, command, option)
    except (OSError, ArgumentError) as error:
        raise click.ClickException(str(error)) from error


def check_picture(path: Path | None, command: str) -> None:
    """``check``, for a picture, and whether it can be drawn."""
    if path is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise click.ClickException(
                "--plot draws with matplotlib, which is not installed: pip install matplotlib"
            )
        check(_named(path), outputs.is_marked, command, "--plot")


def write_picture(figure: Any, path: Path, command: str, **options: Any) -> None:
    """Write matplotlib's ``figure`` as whatever ``path`` ends in (PNG, if in nothing)."""
    path, drawn = _named(path), io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], metadata=outputs.marks(path), **options)
    write(path, drawn.getvalue(), outputs.is_marked, command, "--plot")


def _named(path: Path) -> Path:
    return path if path.suffix else path.with_name(f"{path.name}.png")

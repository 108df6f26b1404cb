"""``setup.cfg`` names every package: a missing one would go unnoticed in an editable install."""

from __future__ import annotations

from configparser import ConfigParser

from support.launch import ROOT


def test_every_package_is_listed() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    folders = [
        init.parent.relative_to(base)
        for base in (ROOT, ROOT / "adapters")
        for init in base.glob("mpizero*/**/__init__.py")
    ]
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in folders)

"""``setup.cfg`` names every package; wheel, sdist and recipes hold what they should."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from mpizero import __version__
from support.launch import ROOT, launch_environment

RECIPES = ROOT / "packaging"


def setup() -> ConfigParser:
    found = ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def test_every_package_is_listed() -> None:
    listed = setup()["options"]["packages"].split()
    folders = [
        init.parent.relative_to(base)
        for base in (ROOT, ROOT / "adapters")
        for init in base.glob("mpizero*/**/__init__.py")
    ]
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in folders)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is made from it: of a copy, which building writes to."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    names = ("mpizero", "adapters", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
    command = ["tar", "--exclude=__pycache__", "--exclude=*.egg-info", "-C", str(ROOT), "-c"]
    packed = subprocess.run([*command, *names], capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(source)], input=packed.stdout, check=True)
    backend = "from setuptools import build_meta as b; import sys; print(b.build_{}(sys.argv[1]))"
    run = [sys.executable, "-W", "ignore", "-c"]
    subprocess.run(
        [*run, backend.format("sdist"), str(folder)], cwd=source, check=True, capture_output=True
    )
    [sdist] = folder.glob("*.tar.gz")
    subprocess.run(["tar", "-x", "-f", str(sdist), "-C", str(folder)], check=True)
    [unpacked] = folder.glob("mpizero-*/")
    subprocess.run(
        [*run, backend.format("wheel"), str(folder)], cwd=unpacked, check=True, capture_output=True
    )
    return folder


@pytest.mark.once
def test_a_wheel_made_from_the_sdist_holds_every_file(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    assert wheel.name == f"mpizero-{__version__}-py3-none-any.whl"
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = {
        str(path.relative_to(base))
        for base in (ROOT, ROOT / "adapters")
        for path in (*base.glob("mpizero*/**/*.py"), *base.glob("mpizero*/py.typed"))
    }
    assert held == source


@pytest.mark.once
def test_the_wheel_is_installed_and_found(built: Path, tmp_path: Path) -> None:
    [wheel] = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(tmp_path), str(wheel)], check=True, capture_output=True)
    env = launch_environment({"PYTHONPATH": str(tmp_path)})
    code = "import mpizero, mpizero.cli, importlib.metadata as m; print(mpizero.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert found.stdout.startswith(str(tmp_path)), found.stderr
    command = subprocess.run(
        [sys.executable, str(tmp_path / "bin" / "mpizero"), "--version"],
        env=env, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert __version__ in command.stdout, command.stderr


@pytest.mark.parametrize("path", ["conda/recipe.yaml", "spack/packages/py_mpizero/package.py"])
def test_recipes_need_what_the_package_needs(path: str) -> None:
    text = (RECIPES / path).read_text().replace("py-", "").replace("-", "_")
    for need in setup()["options"]["install_requires"].split():
        name, _, least = need.replace("-", "_").partition(">=")
        assert re.search(rf"\b{name}(@| >=){re.escape(least.split('.')[0])}", text), need


def test_recipes_are_of_this_version() -> None:
    assert f'version: "{__version__}"' in (RECIPES / "conda/recipe.yaml").read_text()
    spack = (RECIPES / "spack/packages/py_mpizero/package.py").read_text()
    assert f'version("{__version__}"' in spack
    ast.parse(spack)
    [config] = RECIPES.glob("easybuild/*.eb")
    values: dict[str, object] = {"SOURCE_TAR_GZ": "%(name)s-%(version)s.tar.gz"}
    exec(compile(config.read_text(), config.name, "exec"), values)
    toolchain = values["toolchain"]
    assert isinstance(toolchain, dict)
    assert config.stem == f"mpizero-{values['version']}-{toolchain['name']}-{toolchain['version']}"
    assert values["version"] == __version__
    assert (RECIPES / f"modules/{__version__}.lua").exists()

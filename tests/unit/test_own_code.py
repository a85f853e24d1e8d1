"""The user's own modules: which are kept, which are imported, what has changed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.contracts.own_code import (
    collect_code,
    find_changed,
    fingerprint_code,
    import_own,
    list_distributions,
    write_code,
)

NETS = {
    "my_pkg/__init__.py": "",
    "my_pkg/nets.py": "from . import layers\nfrom .deep.heads import part\nimport numpy\n",
    "my_pkg/layers.py": "def late():\n    import my_late\n    from .unused_name import nothing\n",
    "my_pkg/deep/__init__.py": "from ..numbers import SCALE\n",
    "my_pkg/deep/heads.py": "from my_space.parts import part\n",
    "my_pkg/numbers.py": "SCALE = 1\n",
    "my_pkg/other.py": "raise RuntimeError('nobody imports this')\n",
    "my_space/parts.py": "part = 1\n",  # a namespace package
    "my_late.py": "import my_pkg.nets, pipeline.errors, json, yaml\n",
    "json.py": "raise RuntimeError('not the one that this process has')\n",
    "my_script.py": "raise RuntimeError('nobody imports this')\n",
    "pipeline/__init__.py": "raise RuntimeError('a package of the name of ours')\n",
}
NEEDED = {
    "my_pkg/__init__.py", "my_pkg/nets.py", "my_pkg/layers.py", "my_pkg/deep/__init__.py", "my_pkg/deep/heads.py",
    "my_pkg/numbers.py", "my_space/parts.py", "my_late.py",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_modules(working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing that a test imports is there for the next."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> Path:
    write_code(folder, {path: text.encode() for path, text in files.items()})
    return folder


def test_what_is_imported_is_kept_and_nothing_else(working_folder: Path) -> None:
    folder = write(working_folder / "mine", NETS)
    sys.path.insert(0, str(folder))
    code = collect_code("my_pkg.nets", None)
    assert set(code) == NEEDED
    assert code["my_pkg/numbers.py"] == b"SCALE = 1\n"
    kept = working_folder / "kept"
    write_code(kept, code)
    assert collect_code("my_pkg.nets", str(kept)) == code
    assert set(list_distributions(kept)) == {"PyYAML", "numpy"}


def test_what_a_package_loads_by_itself_is_kept_too(working_folder: Path) -> None:
    plugins = "import importlib\nfor name in ('a', 'b'):\n    importlib.import_module(f'my_plugins.{name}')\n"
    files = {"my_plugins/__init__.py": plugins, "my_plugins/a.py": "", "my_plugins/b.py": "", "my_plugins/c.py": ""}
    write(working_folder, {**files, "my_nets.py": "import my_plugins\n"})
    assert set(collect_code("my_nets", None)) == {*files, "my_nets.py"} - {"my_plugins/c.py"}


def test_an_installed_package_is_not_kept(working_folder: Path) -> None:
    folder = write(working_folder / "lib" / "site-packages", {"my_installed/nets.py": "import my_installed\n"})
    sys.path.insert(0, str(folder))
    assert collect_code("my_installed.nets", None) == {}


def test_a_module_that_cannot_be_parsed_is_kept_as_it_is(working_folder: Path) -> None:
    write(working_folder, {"my_nets.py": "def build():\n    import my_broken\n", "my_broken.py": "import\n"})
    assert set(collect_code("my_nets", None)) == {"my_nets.py", "my_broken.py"}


def test_two_versions_in_one_process(working_folder: Path) -> None:
    """Each run has the modules that it keeps; those that are the same are not imported again."""
    files = {"my_nets.py": "from my_parts import part\n", "my_parts.py": "part = 1\n", "my_pkg/__init__.py": ""}
    first, same, other = (write(working_folder / name, files) for name in ("first", "same", "other"))
    (other / "my_parts.py").write_text("part = 2\n")
    module = import_own("my_nets", str(first))
    assert import_own("my_nets", str(same)) is module
    assert import_own("my_nets", str(other)).part == 2
    assert import_own("my_nets", str(first)).part == 1
    assert sys.path.count(str(first)) == 1


def test_the_kept_module_goes_before_that_of_the_current_folder(working_folder: Path) -> None:
    write(working_folder / "kept", {"my_nets.py": "part = 1\n"})
    (working_folder / "my_nets.py").write_text("part = 2\n")
    assert import_own("my_nets", None).part == 2
    assert import_own("my_nets", str(working_folder / "kept")).part == 1


def test_what_has_changed_is_found(working_folder: Path) -> None:
    files = {"my_nets.py": "import my_parts\n", "my_parts.py": ""}
    kept, now = write(working_folder / "kept", files), write(working_folder / "now", files)
    places = [str(working_folder), str(kept), str(now)]
    assert find_changed("my_nets", kept, places) is None
    (now / "my_parts.py").write_text("part = 2\n")
    assert find_changed("my_nets", kept, places) == (kept / "my_parts.py", now / "my_parts.py")
    (now / "my_parts.py").unlink()
    assert find_changed("my_nets", kept, places) == (kept / "my_parts.py", now / "my_parts.py")
    (now / "my_nets.py").unlink()
    assert find_changed("my_nets", kept, places) is None  # they are not there at all


def test_the_fingerprint_is_of_paths_and_contents() -> None:
    codes = [{"a.py": b"1", "b.py": b"2"}, {"a.py": b"12", "b.py": b""}, {"a.py": b"1", "c.py": b"2"}]
    assert len({fingerprint_code(code) for code in codes}) == 3
    assert fingerprint_code(dict(reversed(codes[0].items()))) == fingerprint_code(codes[0])

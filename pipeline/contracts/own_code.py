"""The user's own modules: which ones a network needs, how they are kept, and how they are imported from where they are.

A folder of code holds modules as ``sys.path`` would have them: ``nets.py``, ``package/layers.py``.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from types import ModuleType

CODE_FOLDER = "code"  # of a run, and of a model
PACKAGE = __name__.partition(".")[0]
_INSTALLED = frozenset({"site-packages", "dist-packages"})

Code = Mapping[str, bytes]  # content by path below the folder of code, with slashes


def import_own(module_name: str, folder: str | None) -> ModuleType:
    """Imports a module of the user's.

    Args:
        folder: of code; a module of that name that this process has from elsewhere gives way, unless it is the same to
            the byte. None: the current folder comes first, as ``python -m`` has it, then the installed packages.

    Raises:
        Exception: whatever the module raises.
    """
    if folder is not None:
        place = _absolute(folder)
        sys.path[:] = [str(place), *(entry for entry in sys.path if entry != str(place))]
        _forget_others(place)
    elif os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()  # the folder may have been written a moment ago
    return importlib.import_module(module_name)


def _absolute(folder: str) -> Path:
    return Path(os.path.abspath(os.path.expanduser(folder)))


def _forget_others(folder: Path) -> None:
    names = {_module_name(path): folder / path for path in list_files(folder)}
    loaded = {name: _file_of(sys.modules[name]) for name in names if name in sys.modules}
    if all(file is not None and _is_same(file, names[name]) for name, file in loaded.items()):
        return
    for name in loaded:  # also those that are the same: they may have imported one that is not
        del sys.modules[name]


def _is_same(file: Path, kept: Path) -> bool:
    return file == kept or (file.is_file() and file.read_bytes() == kept.read_bytes())


def collect_code(module_name: str, folder: str | None) -> dict[str, bytes]:
    """A module, and all that it imports, directly or not, from the folder that it is itself imported from.

    Import statements are followed wherever they stand, also within functions. Of a package that is imported, modules
    that it has loaded in another way (plugins) are there too. Empty where the module belongs to an installed package.

    Args:
        folder: as for ``import_own``.

    Returns:
        contents by path.

    Raises:
        Exception: whatever the module raises when it is imported.
    """
    file = _file_of(import_own(module_name, folder))
    if file is None or file.suffix != ".py" or _INSTALLED & set(file.parts):
        return {}
    root = _absolute(folder) if folder else file.parents[module_name.count(".") + (file.name == "__init__.py")]
    found: dict[str, bytes] = {}
    waiting = [module_name]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        parent = name.rpartition(".")[0]
        if name in seen or name.partition(".")[0] == PACKAGE:
            continue
        seen.add(name)
        if parent:
            waiting.append(parent)
        path = _find(root, name)
        if path is None:
            continue
        found[path] = (root / path).read_bytes()
        waiting += _imported_names(found[path], name if path.endswith("__init__.py") else parent)
    packages = {path.partition("/")[0] for path in found if "/" in path}
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        if (path := _find(root, name)) is not None:
            found.setdefault(path, (root / path).read_bytes())
    return found


def _find(root: Path, name: str) -> str | None:
    """Path below ``root`` of a module that this process has from there, or would take from there."""
    path = _path_below(root, name)
    if path is None or name not in sys.modules:
        return path
    file = _file_of(sys.modules[name])  # a module of the standard library may have the same name
    return path if file is not None and _is_same(file, root / path) else None


def _path_below(root: Path, name: str) -> str | None:
    stem = name.replace(".", "/")
    return next((path for path in (f"{stem}/__init__.py", f"{stem}.py") if (root / path).is_file()), None)


def _imported_names(source: bytes, package: str) -> Iterator[str]:
    """Everything that the import statements of a module of ``package`` may mean; some are no modules."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # whoever imports it will be told
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*filter(None, above), *filter(None, [node.module])])
            yield from filter(None, [base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)])


def list_distributions(folder: Path) -> list[str]:
    """Names of the installed distributions whose packages the modules in a folder of code import."""
    paths = list(list_files(folder))
    names = {
        name.partition(".")[0]
        for path in paths
        for name in _imported_names((folder / path).read_bytes(), _module_name(path).rpartition(".")[0])
    }
    own = {path.partition("/")[0].removesuffix(".py") for path in paths}
    by_package = metadata.packages_distributions() if names - own - sys.stdlib_module_names else {}
    found = {by_package[name][0] for name in names - own - {PACKAGE} if name in by_package}
    return sorted(found)


def fingerprint_code(code: Code) -> str:
    """16 hex digits of a SHA-256 over paths and contents."""
    digest = hashlib.sha256()
    for path in sorted(code):
        digest.update(f"{path}\0{len(code[path])}\0".encode() + code[path])
    return digest.hexdigest()[:16]


def write_code(folder: Path, code: Code) -> None:
    """Writes modules into a folder."""
    for path, content in code.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def find_changed(module_name: str, kept: Path, places: Iterable[str]) -> tuple[Path, Path] | None:
    """A module in ``kept`` that is another now, where the user would import it from.

    Args:
        kept: folder of code that has the module of this name.
        places: folders that are searched, the first that has the module counts.

    Returns:
        the file as kept, and as it is now; none: nothing changed, or the module is in none of the places.
    """
    own = _path_below(kept, module_name)
    if own is None:
        return None
    roots = (Path(place) for place in places if Path(place) != kept)
    root = next((root for root in roots if (root / own).is_file()), None)
    if root is None:
        return None
    changed = (path for path in list_files(kept) if not _is_same(root / path, kept / path))
    return next(((kept / path, root / path) for path in changed), None)


def list_files(folder: Path) -> Iterator[str]:
    """Paths of the user's modules in a folder of code, in order; a model of MLflow's has this package beside them."""
    for path in sorted(folder.rglob("*.py")):
        below = path.relative_to(folder).as_posix()
        if below.partition("/")[0] != PACKAGE:
            yield below


def _module_name(path: str) -> str:
    return ".".join(PurePosixPath(path.removesuffix("/__init__.py").removesuffix(".py")).parts)


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file)

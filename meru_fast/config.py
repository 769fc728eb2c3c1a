"""Configs are Python files that name callables (the lazy configs of Detectron2), overridden on the command line.

A config file holds plain dictionaries; ``LazyCall(target)(**arguments)`` records a call without making it:

    from meru_fast.config import LazyCall
    from .train_meru_vit_l import dataset, model, optim, train     # config files import each other relatively

    model.visual.arch = "vit_base_patch16_224"

``load`` reads such a file (or the YAML that ``save`` wrote), ``instantiate`` makes the recorded calls. Values are what
YAML can hold: numbers, strings, booleans, None, lists and dictionaries. So a saved config trains again unchanged.
"""

import difflib
import enum
import importlib
import importlib.machinery
import importlib.util
import inspect
import itertools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from meru_fast.files import whole

TARGET = "_target_"
TRUST = "MERU_FAST_TRUST"  # variable with the packages, comma-separated, that YAML files may name too
YAML_TARGETS = re.compile(
    r"meru_fast\.(data|models|evaluation(\.[a-z_]+)?|training\.optim)\.(build_\w+|[A-Z]\w*)"
    r"|torch\.(nn|optim(\.lr_scheduler)?)\.[A-Z]\w*"
)
PACKAGED = "meru_fast.configs"

_load_lock = threading.RLock()
_load_count = itertools.count()


class ConfigError(ValueError):
    """A config that cannot be read, overridden or instantiated; the message names the place and the fix."""


class LazyCall:
    """Record a call: ``LazyCall(target)(**arguments)`` is a DictConfig with the target's import path in ``_target_``.

    Args:
        target: a callable found at the top level of an importable module, or its dotted name (which is not imported
            before ``instantiate``).

    Raises:
        ConfigError: a target that cannot be imported by name, or, when called, an argument that YAML cannot hold.
    """

    def __init__(self, target: Callable | str):
        self.target = target if isinstance(target, str) else _dotted_name(target)

    def __call__(self, **arguments: Any) -> DictConfig:
        return OmegaConf.create({TARGET: self.target, **_plain(arguments, self.target)})


def load(path: str | os.PathLike, overrides: Iterable[str] = ()) -> DictConfig:
    """Read a config.

    Args:
        path: a ``.py`` or ``.yaml`` file. What is not found there is looked up among the packaged configs, by file name
            with or without folder and suffix (``train_meru_vit_l``).
        overrides: ``a.b.c=value`` strings, the value in YAML. The key must exist; ``+a.b.c=value`` adds one.

    Returns:
        Of a Python file every public lower-case dictionary, by name (``dataset``, ``model``, ``optim``, ``train``,
        ``evaluator``, ...); of YAML the whole document.

    Raises:
        ConfigError: no such file, a file that fails, an unknown key (the nearest valid one is named), a wrong type, or
            YAML that names code of other packages than torch's layers and optimizers and ours (a Python config may:
            it is code itself). The environment variable MERU_FAST_TRUST=package,package allows more.
    """
    file = find(path)
    config = _load_python(file) if file.suffix == ".py" else _load_yaml(file)
    return apply_overrides(config, overrides)


def find(path: str | os.PathLike) -> Path:
    """The file that `path` means: itself, or the packaged config of that name. Raises ConfigError if neither is."""
    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix not in (".py", ".yaml", ".yml"):
            raise ConfigError(f"{path}: a config is a .py or .yaml file")
        return path.resolve()
    packaged = _packaged_folder() / f"{path.stem if path.suffix == '.py' else path.name}.py"
    if packaged.is_file():
        return packaged
    hint = _nearest(path.stem, available())
    raise ConfigError(f"no config file {str(path)!r} (in {Path.cwd()}) and no packaged config of that name{hint}")


def available() -> list[str]:
    """Names of the packaged configs."""
    return sorted(file.stem for file in _packaged_folder().glob("*.py") if not file.stem.startswith("_"))


def apply_overrides(config: DictConfig, overrides: Iterable[str]) -> DictConfig:
    """A copy of `config` with the ``key=value`` strings applied in order. Raises ConfigError as ``load`` does."""
    config = config.copy()
    for override in overrides:
        key, equals, text = override.partition("=")
        adding, key = key.startswith("+"), key.removeprefix("+").strip()
        if not equals or not key:
            raise ConfigError(f"override {override!r}: expected key=value, such as train.num_iterations=1000")
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        except Exception as error:
            raise ConfigError(f"override {override!r}: {text!r} is not valid YAML ({error})") from error
        value = parsed["value"] if adding else _checked(config, key, parsed["value"], text)
        OmegaConf.update(config, key, value, merge=False, force_add=adding)
    return config


def save(config: DictConfig, path: str | os.PathLike) -> None:
    """Write `config` as YAML that ``load`` reads back to an equal config. The file appears whole or not at all."""
    with whole(Path(path)) as partial:
        partial.write_text(OmegaConf.to_yaml(config), encoding="utf-8")


def instantiate(node: Any, **arguments: Any) -> Any:
    """Make the calls that `node` records, innermost first.

    Args:
        node: a config node. Dictionaries with ``_target_`` become the result of the call, all else is returned as plain
            dictionaries, lists and scalars.
        arguments: added to (and stronger than) the outermost call's own.

    Raises:
        ConfigError: the target cannot be imported, or does not take these arguments.
    """
    if isinstance(node, (DictConfig, ListConfig)):
        try:
            node = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{getattr(error, 'full_key', '')}: {error}") from error
    if isinstance(node, list):
        return [instantiate(item) for item in node]
    if not isinstance(node, dict):
        return node
    values = {key: instantiate(value) for key, value in node.items() if key != TARGET and key not in arguments}
    values |= arguments
    return _call(node[TARGET], values) if TARGET in node else values


def locate(name: str) -> Callable:
    """Import the callable with the dotted `name`. Raises ConfigError if there is none."""
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")) or "." not in name:
        raise ConfigError(f"{TARGET} must be a dotted name such as 'torch.optim.AdamW', got {name!r}")
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:split])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
                continue
            raise ConfigError(f"{TARGET} {name!r}: importing {module_name} failed: {error}") from error
        for depth, part in enumerate(parts[split:], start=split):
            if not hasattr(found, part):
                hint = _nearest(part, dir(found))
                raise ConfigError(f"{TARGET} {name!r}: {'.'.join(parts[:depth])} has no {part!r}{hint}")
            found = getattr(found, part)
        if not callable(found):
            raise ConfigError(f"{TARGET} {name!r} is not callable")
        return found
    raise ConfigError(f"{TARGET} {name!r}: no module named {parts[0]!r}")


def _call(name: str, arguments: dict[str, Any]) -> Any:
    target = locate(name)
    try:
        signature = inspect.signature(target)
    except ValueError:  # builtins without a signature check their arguments themselves
        return target(**arguments)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        unknown = [key for key in arguments if key not in signature.parameters]
        hint = _nearest(unknown[0], list(signature.parameters)) if unknown else ""
        raise ConfigError(f"{name}: {error}{hint}") from error
    return target(**arguments)


def _dotted_name(target: Callable) -> str:
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", "")
    if not callable(target) or module is None or "<" in name or module.startswith(_PREFIX) or module == "__main__":
        raise ConfigError(
            f"LazyCall target {target!r} cannot be imported by name: it must live at the top level of a module, "
            "not in a config file, a script or another function"
        )
    return f"{module}.{name}"


def _plain(value: Any, where: str) -> Any:
    """`value` in the types that YAML holds, so that a config from Python and its saved YAML are the same config."""
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, (DictConfig, ListConfig)):
        return _plain(OmegaConf.to_container(value, resolve=False), where)
    if isinstance(value, dict):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, enum.Enum) and isinstance(value.value, (bool, int, float, str)):
        return value.value
    raise ConfigError(f"{where}: {value!r} cannot be written to YAML; give its name, or a LazyCall that builds it")


_PREFIX = "_meru_fast_config_"


class _UncachedLoader(importlib.machinery.SourceFileLoader):
    """Never reads or writes bytecode: two edits within a second must not run the older one."""

    def path_stats(self, path):
        raise OSError("config files are not cached")


class _ConfigFinder:
    """Finds the config files that the file being loaded imports relatively."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None):
        if not name.startswith(_PREFIX) or path is None:
            return None
        for folder in map(Path, path):
            stem = folder / name.rpartition(".")[2]
            file = stem.with_name(f"{stem.name}.py")
            if file.is_file():
                return importlib.util.spec_from_file_location(name, file, loader=_UncachedLoader(name, str(file)))
            if stem.is_dir():
                return _package_spec(name, stem)
        return None


def _package_spec(name: str, folder: Path) -> importlib.machinery.ModuleSpec:
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    return spec


@contextmanager
def _private_modules() -> Iterator[str]:
    """A fresh package name to import config files under; every trace of it is gone afterwards.

    The packaged configs are imported afresh too, since a config that imports them goes on to change their values.
    """

    def ours(name: str) -> bool:
        return name.startswith((_PREFIX, f"{PACKAGED}.")) or name == PACKAGED

    finder = _ConfigFinder()
    with _load_lock:
        before = {name: sys.modules.pop(name) for name in list(sys.modules) if ours(name)}
        sys.meta_path.insert(0, finder)
        try:
            yield f"{_PREFIX}{next(_load_count)}"
        finally:
            sys.meta_path.remove(finder)
            for name in [name for name in sys.modules if ours(name)]:
                del sys.modules[name]
            sys.modules.update(before)


def _load_python(file: Path) -> DictConfig:
    with _private_modules() as package:
        # One package per folder above the file, so that "from ..other import x" reaches as far up as it likes.
        for depth, folder in enumerate(reversed(file.parents)):
            package = package if depth == 0 else f"{package}.p{depth}"
            sys.modules[package] = importlib.util.module_from_spec(_package_spec(package, folder))
        name = f"{package}.{file.stem}"
        loader = _UncachedLoader(name, str(file))
        module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, loader, origin=str(file)))
        module.__file__ = str(file)
        sys.modules[name] = module
        try:
            loader.exec_module(module)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"{file}: {_origin(error, file)}{type(error).__name__}: {error}") from error
        found = {
            name: _plain(value, name)
            for name, value in vars(module).items()
            if isinstance(value, (dict, DictConfig)) and name[0].islower()
        }
    if not found:
        raise ConfigError(f"{file}: holds no config (no public lower-case dictionary or LazyCall at its top level)")
    return OmegaConf.create(found)


def _origin(error: Exception, file: Path) -> str:
    """'line n: ' of the deepest frame inside `file`."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"line {line}: " if line else ""


def _load_yaml(file: Path) -> DictConfig:
    try:
        config = OmegaConf.load(file)
    except Exception as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(config, DictConfig) or not config:
        raise ConfigError(f"{file}: expected a mapping with dataset, model, optim and train")
    _refuse_foreign_code(OmegaConf.to_container(config), file)
    return config


def _refuse_foreign_code(node: Any, file: Path) -> None:
    """A YAML file is data, from anywhere: it may name what configs are made of here, and nothing that runs commands."""
    if isinstance(node, dict):
        target = node.get(TARGET)
        own = str(target).partition(".")[0] in os.environ.get(TRUST, "").split(",")
        if target is not None and not own and not YAML_TARGETS.fullmatch(str(target)):
            raise ConfigError(
                f"{file}: refused, its {TARGET} {target!r} is code that no config of meru_fast names. If you trust the "
                f"file and that package, set {TRUST}={str(target).partition('.')[0]}, or write the config in Python"
            )
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _refuse_foreign_code(value, file)


def _packaged_folder() -> Path:
    return Path(importlib.import_module(PACKAGED).__path__[0])


def _checked(config: DictConfig, key: str, value: Any, text: str) -> Any:
    """`value` in the type that `key` holds now. Raises ConfigError for a key that is not there and for another type."""
    node: Any = config
    done: list[str] = []
    for part in key.replace("[", ".").replace("]", "").split("."):
        keys = _keys(node)
        if part not in keys:
            hint = _nearest(part, keys, prefix=".".join(done))
            hint = hint or _nearest(key, _all_keys(config))
            raise ConfigError(f"unknown config key {key!r}{hint}; +{key}=... adds a new one")
        node = _child(node, part)
        done.append(part)
    return _cast(key, node, value, text)


def _keys(node: Any) -> list[str]:
    if isinstance(node, DictConfig):
        return [str(key) for key in node]
    return [str(index) for index in range(len(node))] if isinstance(node, ListConfig) else []


def _child(node: Any, part: str) -> Any:
    return node[int(part)] if isinstance(node, ListConfig) else node[part]


def _all_keys(node: Any, prefix: str = "") -> list[str]:
    found = []
    for part in _keys(node):
        found.append(f"{prefix}{part}")
        found += _all_keys(_child(node, part), f"{prefix}{part}.")
    return found


def _cast(key: str, old: Any, new: Any, text: str) -> Any:
    if old is None or new is None or isinstance(old, ListConfig):
        return new
    if isinstance(old, DictConfig):
        if isinstance(new, dict):
            return new
        raise ConfigError(f"{key}={text}: {key} is a group of keys ({', '.join(_keys(old))}); set one of them")
    if isinstance(old, str):
        return text if isinstance(new, (bool, int, float)) else new
    if isinstance(old, bool) or isinstance(new, bool):
        fits = isinstance(old, bool) and isinstance(new, bool)
    elif isinstance(old, int) and isinstance(new, float) and new.is_integer():
        return int(new)
    else:
        fits = isinstance(new, (int, float)) if isinstance(old, float) else isinstance(new, int)
    if not fits:
        raise ConfigError(f"{key}={text}: expected {type(old).__name__}, as in {key}={old}")
    return float(new) if isinstance(old, float) else new


def _nearest(name: str, candidates: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {prefix + '.' if prefix else ''}{close[0]}?" if close else ""

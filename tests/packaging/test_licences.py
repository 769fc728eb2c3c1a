"""Licences of everything that `meru_fast[all]` brings: permissive, or listed here with the reason."""

import re
from importlib import metadata

from packaging.requirements import Requirement

NAMES = "MIT|BSD|Apache|ISC|PSF|Python-2[.]0|Python Software Foundation|CNRI-Python|HPND|Unlicense|0BSD|Zlib|CC0"
PERMISSIVE = re.compile(rf"\b({NAMES})\b", re.IGNORECASE)
ALLOWED = {
    "certifi": "MPL-2.0, a list of certificates used as it is",
    "tqdm": "MPL-2.0 and MIT, used as it is",
    "pathspec": "MPL-2.0, used as it is (a part of mypy)",
    "hypothesis": "MPL-2.0, used as it is, in tests only",
    "orderly-set": "MIT",
}
ALLOWED_PREFIXES = {
    "nvidia-": "NVIDIA's redistributable CUDA libraries, which torch requires",
    "cuda-": "NVIDIA's redistributable CUDA libraries, which torch requires",
}


def requirements(name: str, extras: frozenset[str]) -> list[Requirement]:
    """The direct requirements of an installed distribution that apply on this machine."""
    parsed = [Requirement(text) for text in metadata.requires(name) or []]
    environments = [{"extra": extra} for extra in extras or [""]]
    return [r for r in parsed if r.marker is None or any(r.marker.evaluate(e) for e in environments)]


def closure() -> set[str]:
    """Names of all installed distributions that meru_fast[all] needs, directly or not."""
    found: set[str] = set()
    todo = [("meru_fast", frozenset({"all"}))]
    while todo:
        name, extras = todo.pop()
        for requirement in requirements(name, extras):
            key = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if key not in found:
                try:
                    metadata.distribution(key)
                except metadata.PackageNotFoundError:
                    continue
                found.add(key)
                todo.append((key, frozenset(requirement.extras)))
    return found


def licence(name: str) -> str:
    """What a distribution says of its licence: expression, classifiers, or the first words of the free text."""
    about = metadata.metadata(name)
    classifiers = [c.rsplit("::", 1)[1] for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
    return " ; ".join([about.get("License-Expression") or "", *classifiers, (about.get("License") or "")[:200]]).strip(
        " ;"
    )


def test_every_dependency_is_permissive_or_listed():
    names = closure()
    assert {"torch", "deepspeed", "timm"} <= names
    unknown = {
        name: licence(name)
        for name in sorted(names)
        if not PERMISSIVE.search(licence(name)) and name not in ALLOWED and not name.startswith(tuple(ALLOWED_PREFIXES))
    }
    assert unknown == {}


def test_our_own_licence():
    assert metadata.metadata("meru_fast")["License-Expression"] == "Apache-2.0"

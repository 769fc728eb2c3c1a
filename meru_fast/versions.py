"""Versions of what is installed."""

from importlib.metadata import PackageNotFoundError, version


def installed(name: str) -> str:
    """Version of a distribution, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"

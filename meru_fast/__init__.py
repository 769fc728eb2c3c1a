"""meru_fast: train, evaluate and build on hyperbolic image-text models."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("meru_fast")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

"""The fixture that poisons fresh memory, for all tests of the ops."""

from accuracy import poisoned_empty

__all__ = ["poisoned_empty"]

"""An evaluation that needs no data set."""

from meru_fast.config import LazyCall

evaluator = LazyCall("toy_evaluator.Separation")()

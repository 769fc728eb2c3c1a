"""The two ways data can go wrong: one sample (replaced, counted) or the whole run (ended, explained)."""


class DataError(RuntimeError):
    """The data cannot be used as asked; the message names what, where and the fix."""


class BadSampleError(Exception):
    """One sample cannot be used. It is counted and replaced; the text is the reason, without shard or key."""

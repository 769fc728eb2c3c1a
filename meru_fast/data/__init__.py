"""Deterministic, resumable, corruption-proof image-text data. Start at `meru_fast.data.build_loader`."""


def __getattr__(name: str):
    # Lazy, so that `meru-fast index` does not pay for torch.
    if name in ("build_loader", "Batch", "Loader"):
        from meru_fast.data import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

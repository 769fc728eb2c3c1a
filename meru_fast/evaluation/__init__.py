"""Zero-shot classification, retrieval, linear probes and traversals of trained models."""


def main(argv: list[str] | None = None) -> None:
    """Command line of ``scripts/evaluate.py`` (imported on use: this package stays light)."""
    from meru_fast.evaluation.runner import main as run

    run(argv)

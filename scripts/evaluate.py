"""Evaluate checkpoints: python scripts/evaluate.py --help."""

from meru_fast.evaluation import main

if __name__ == "__main__":
    main()

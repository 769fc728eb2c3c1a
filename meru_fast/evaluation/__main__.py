"""``python -m meru_fast.evaluation`` is ``scripts/evaluate.py``, for an installed wheel."""

from meru_fast.evaluation import main

if __name__ == "__main__":
    main()

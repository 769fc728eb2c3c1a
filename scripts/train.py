"""Train a model: `python scripts/train.py --help`."""

import sys

from meru_fast.training import main

sys.exit(main())

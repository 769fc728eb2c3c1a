"""Run several evaluations one after the other: torchrun ... eval_ranks.py commands.json."""

import json
import sys
from pathlib import Path

from meru_fast.evaluation import main

for command in json.loads(Path(sys.argv[1]).read_text()):
    main(command)

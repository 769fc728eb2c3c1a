"""Run several evaluations one after the other: torchrun ... eval_ranks.py commands.json."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from meru_fast.evaluation import main

dist.init_process_group("gloo")  # once: each evaluation finds it there
for command in json.loads(Path(sys.argv[1]).read_text()):
    main(command)
dist.destroy_process_group()

import sys

from meru_fast.training.launch import main

sys.exit(main())

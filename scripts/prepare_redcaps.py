"""Pack the RedCaps downloader's folder into shards: `python scripts/prepare_redcaps.py --help`."""

import sys

from meru_fast.data.redcaps import main

sys.exit(main())

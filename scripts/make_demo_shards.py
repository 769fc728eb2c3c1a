"""Write the demo's data: shards in the RedCaps layout and a held-out part. See ``--help``."""

from meru_fast.demo.shards import main

if __name__ == "__main__":
    main()

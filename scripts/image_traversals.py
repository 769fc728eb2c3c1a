"""From images to the root of the embedding space: python scripts/image_traversals.py --help."""

from meru_fast.evaluation.traversal import main

if __name__ == "__main__":
    main()

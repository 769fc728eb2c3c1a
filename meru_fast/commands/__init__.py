"""Commands of ``meru-fast`` that belong to no other module; each has a ``main(argv)``."""

"""`python -m shardscale`: the command line, under whatever starts Python programs."""

from shardscale.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()

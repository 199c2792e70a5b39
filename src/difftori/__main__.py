"""`python -m difftori` is the command `difftori`."""

import sys

from difftori.cli import main

if __name__ == "__main__":
    sys.exit(main())

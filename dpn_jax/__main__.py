"""`python -m dpn_jax` is the command `dpn-jax`."""

import sys

from dpn_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

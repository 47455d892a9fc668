"""The command ``python -m train.robustness``."""

import sys

from train.robustness.run import main

if __name__ == "__main__":
    sys.exit(main())

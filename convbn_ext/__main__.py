"""``python -m convbn_ext demo | solve | experiment | doctor``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

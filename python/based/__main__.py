"""`python -m based`, for where the script `based` is not on the path."""

import sys

from based.cli import main

sys.exit(main())

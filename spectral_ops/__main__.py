"""`python -m spectral_ops`, the same as `spectral-ops`."""

import sys

from spectral_ops.cli import main

sys.exit(main())

"""``python -m undiffuse`` is ``undiffuse``."""

import sys

from .commands import main

sys.exit(main())

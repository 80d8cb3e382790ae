"""``python -m tilewright.bench``: the same as ``tilewright bench``."""

import sys

from tilewright.bench import main

sys.exit(main())

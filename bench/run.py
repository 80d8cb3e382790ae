"""python bench/run.py: the same as `tilewright bench`."""

import sys

from tilewright.bench import main

sys.exit(main())

"""``python -m bitnet_ext.cli``."""

import sys

from bitnet_ext.cli.program import main

sys.exit(main())

"""`python -m kandinsky.checkpoints PATH`; see inspect.py."""

import sys

from kandinsky.checkpoints.inspect import main

sys.exit(main())

"""`python -m minillava COMMAND`, also under torchrun: `torchrun -m minillava train ...`."""

import sys

from minillava.cli import main

sys.exit(main())

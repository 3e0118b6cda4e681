"""Run ``tumorsynth`` as ``python -m tumorsynth``."""

import sys

from tumorsynth.commands.main import main

if __name__ == "__main__":
    sys.exit(main())

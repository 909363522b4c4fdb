"""`python3 -m elastic.cli`: the command `elastictok`, for an interpreter whose programs are not on the path."""

import sys

from elastic.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

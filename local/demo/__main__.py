"""`make demo`: checks the version of Python before anything that only a new one can read, then runs the demo."""

import sys

OLDEST, NEWEST = (3, 11), (3, 13)
FOUND = tuple(sys.version_info[:2])

if FOUND < OLDEST or FOUND > NEWEST:
    sys.exit(
        f"Houndloop needs Python 3.11, 3.12 or 3.13, and this is Python {FOUND[0]}.{FOUND[1]} ({sys.executable}); "
        "name another one: make demo PYTHON=python3.12"
    )

from local.demo.run import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())

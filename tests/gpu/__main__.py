"""``python -m tests.gpu``; see ``tests/gpu/program.py``."""

from __future__ import annotations

import sys

from tests.gpu.program import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m refreward_trl` is the same program as `refreward`."""

from __future__ import annotations

import sys

from refreward_trl.cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

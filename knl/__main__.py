"""`python -m knl` is the `knl` command."""

from __future__ import annotations

from knl.cli import main

if __name__ == "__main__":
    main()

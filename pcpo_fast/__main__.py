"""``python -m pcpo_fast``."""

from pcpo_fast.cli import main

raise SystemExit(main())

"""`python -m cassetta`, which is `cassetta` where the script is not on the path."""

from cassetta.cli import main

raise SystemExit(main())

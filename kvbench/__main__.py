"""``python -m kvbench``."""

from kvbench.cli.app import main

main()

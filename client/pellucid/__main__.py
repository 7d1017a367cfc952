"""``python -m pellucid``: the command line."""

from ._cli import main

main()

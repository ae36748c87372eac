"""``python -m edgeexit`` is the command line."""

from edgeexit.cli import main

main()

"""`python -m polycollide`."""

from polycollide.cli import main

main()

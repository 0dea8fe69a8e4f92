"""`python -m evoopt`."""

from evoopt.cli import main

main()

"""`python -m mhesa`."""

from mhesa.cli import main

main()

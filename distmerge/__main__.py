"""`python -m distmerge`: the command line where no script is installed."""

from distmerge.cli.app import main

main()

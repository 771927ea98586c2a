"""`python -m elastic`: the `elastic` command, also where nothing is installed and the sources are only on the path."""

from elastic.cli.main import main

main()

"""`python -m elastic.cli`: the `elastic` command."""

from elastic.cli.main import main

main()

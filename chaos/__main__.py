"""`python -m chaos`: the `elastic-chaos` command, likewise."""

from chaos.cli.main import main

main()

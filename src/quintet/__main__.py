"""`python -m quintet`: the command line."""

from quintet.cli import main

main()

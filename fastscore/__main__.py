"""`python -m fastscore` is the command `fastscore`."""

from .cli.commands import main

main(prog_name="fastscore")

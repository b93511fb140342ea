"""`python -m fastscore` is the command `fastscore`."""

from .cli import main

main(prog_name="fastscore")

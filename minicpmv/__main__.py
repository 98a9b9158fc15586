"""`python -m minicpmv`: the same as the `minicpmv` command."""

from minicpmv.commands.main import app


app(prog_name="minicpmv")

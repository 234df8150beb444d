"""`python -m opt_ds …` is `opt-ds …`."""

from opt_ds.cli import main

main()

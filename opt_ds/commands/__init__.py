"""The functions behind the `opt-ds` commands, by topic; opt_ds/cli.py registers them."""

"""The former name of `opt_ds.serving`; goes with the next release."""

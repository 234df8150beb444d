"""Extensions of opt_ds by another package, without a change to opt_ds."""

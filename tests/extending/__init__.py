"""What another package can add to opt_ds without changing it, and what that package then looks like."""

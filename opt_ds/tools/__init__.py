"""Tools around training: what a run will need (`plan`), and whether this machine can run it (`doctor`)."""

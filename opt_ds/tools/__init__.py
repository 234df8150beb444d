"""Tools around training: requirements of a run (`plan`), and whether this machine can run it (`doctor`)."""

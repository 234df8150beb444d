"""Faults of a run on a shared machine: kills at any moment, full disks, dead and hung ranks, launchers' signals."""

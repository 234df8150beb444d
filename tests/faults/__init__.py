"""What may happen to a run on a shared machine: kills at any moment, full disks, lost and hung ranks, launchers' signals."""

"""What a run reports: its log, its metrics, and trackers."""

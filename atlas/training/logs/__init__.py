"""The logs of a run, its metrics, and trackers such as TensorBoard."""

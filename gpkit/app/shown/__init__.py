"""What a run shows: its first and last lines, and what loggers get beside the metrics."""

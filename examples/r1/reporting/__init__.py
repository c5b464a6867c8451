"""What a run shows: progress, tables, curves, the page."""

"""What a network learns from, and how: a run, its targets, its validation."""

"""Sound files in and out: what is on the user's disk, and what is written there."""

"""Image folders, pairs, resizing, sampling and the scripts that prepare data."""

"""The figures and pictures of results/: measured into JSON files, and rendered from these."""

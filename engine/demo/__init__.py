"""What demo.py does: compare the models on a photograph, or enlarge pictures of one's own."""

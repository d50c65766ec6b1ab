"""Measurements of speed and quality, made in one run on one machine."""

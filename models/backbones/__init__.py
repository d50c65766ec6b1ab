"""Backbones: each is an original super-resolution network and, without its tail, an encoder."""

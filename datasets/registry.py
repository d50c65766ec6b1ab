"""Names under which configs ask for data sets and for the wrappers that make samples of them."""

from utils.registry import Registry

DATASETS = Registry("dataset")
WRAPPERS = Registry("wrapper")

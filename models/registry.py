"""The registry of model builders. A model file adds itself with ``@MODELS.register(name)``."""

from utils.registry import Registry

MODELS = Registry("model")

"""Loaders for other frameworks. The only modules that import torch."""

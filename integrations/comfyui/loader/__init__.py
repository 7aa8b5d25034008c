"""Copies of files of ``catversion_jax/integrations/``; change them there and run
``python tools/comfyui/copy_loader.py``.
"""

"""The frozen networks of a Stable Diffusion folder, and how they are read from it."""

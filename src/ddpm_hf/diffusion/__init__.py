"""The diffusion itself: scheduler, pipeline and the checkpoint on disk.

Everything in this folder travels with the weights, as a copy of the whole folder, and needs nothing
that a reader with stock diffusers lacks.
"""

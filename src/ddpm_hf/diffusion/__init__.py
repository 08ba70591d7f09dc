"""Diffusion: scheduler, pipeline and checkpoint format.

All files of this folder are saved with the weights. They import only stock diffusers and its
dependencies.
"""

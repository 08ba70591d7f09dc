"""Conversion of improved-diffusion and guided-diffusion checkpoints to portable ones.

Both repositories keep the weights of a `UNetModel` in `.pt` files and its arguments in the flags of
their scripts (2102.09672, 2105.05233). The network is a stock `UNet2DModel` under other names, with
q, k and v of each attention head taken apart. What `UNet2DModel` cannot express is refused.

convert   `convert`: a checkpoint as a pipeline
flags     flags of the scripts, and those of the published models
network   configuration of `UNet2DModel` and of the scheduler
weights   state dicts: read, described by flags, renamed
"""

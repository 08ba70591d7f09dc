"""Images by (seed, index): in any number, by any number of processes, in files that can be gone on.

    drawn = draw_to(pipeline, "digits", 50_000, seed=0, batch_size=256)   # or goes on there
    for pixels in drawn.batches():                    # (B, H, W, C) uint8, in the order of indices
        ...
    open_drawn("digits.npz"), open_drawn("folder")    # what others drew, read in the same way

Image i is a function of (seed, i): its noise comes from a generator of its own. Its bits are the
same for any number of processes and after any restart, at one batch size on one kind of device;
another batch size rounds differently, which `draw_to` puts into figures.
"""

from ddpm_hf.sampling.batches import draw_images
from ddpm_hf.sampling.drawn import DrawnImages, open_drawn
from ddpm_hf.sampling.job import draw_to

__all__ = ["DrawnImages", "draw_images", "draw_to", "open_drawn"]

"""Images by (seed, index): in any number, by any number of processes, in files that can be gone on.

    drawn = draw_to(pipeline, "digits", 50_000, seed=0, batch_size=256)   # or goes on there
    for pixels in drawn.batches():                    # (B, H, W, C) uint8, in the order of indices
        ...
    save_drawn(pipeline, "digits.npz", 50_000)        # in a form that others read
    open_drawn("digits.npz"), open_drawn("folder")    # what others drew, read in the same way

Image i is a function of (seed, i): its noise comes from a generator of its own. Its bits are the
same for any number of processes and after any restart, at one batch size on one kind of device (on
a CPU, with one number of threads). Others round sums in another order: 28x28 digits in 50 steps
of eta = 0, drawn 1, 7 or 64 at once by 1 or 2 threads, differed by at most 7e-6 of the range from
those drawn 16 at once, and no pixel of 8 bits differed.
"""

from ddpm_hf.sampling.batches import draw_images
from ddpm_hf.sampling.image_reader import DrawnImages, open_drawn
from ddpm_hf.sampling.image_writer import save_drawn
from ddpm_hf.sampling.sampler_choice import use_recommended
from ddpm_hf.sampling.sharded_sampling import draw_to

__all__ = ["DrawnImages", "draw_images", "draw_to", "open_drawn", "save_drawn", "use_recommended"]

"""Sampling of any number of images, by any number of processes, into files that can be resumed.

    drawn = draw_to(pipeline, "digits", 50_000, seed=0, batch_size=256)   # repeat it to resume
    for pixels in drawn.batches():                    # (B, H, W, C) uint8, in the order of indices
        ...
    save_drawn(pipeline, "digits.npz", 50_000)        # in a format that other programs read
    open_drawn("digits.npz"), open_drawn("folder")    # also files of other programs

Image i is a function of (seed, i): its noise comes from its own generator. Its bits are the same
for any number of processes and after any interruption, at one batch size on one type of device (on
a CPU, with one number of threads). Another batch size or number of threads changes the order of
sums: 28x28 digits in 50 steps with eta = 0, sampled in batches of 1, 7 or 64 by 1 or 2 threads,
differed by at most 7e-6 of the range from those in batches of 16, and no 8-bit pixel differed.

Sampling
    sampler_choice          scheduler, steps and eta from the options; `choose_setting`
    batches                 images, each from its own noise; `draw_images`
    sharded_sampling        into a folder, shared by processes and resumed; `draw_to`
    sampling_to_files       into a file or folder of a common format; `save_drawn`
    planned_optimization    the fastest settings of the network for a set of images
    sampling_record         settings of a set, stored as JSON and compared on resume
    class_labels            class numbers of the images

Files
    output_paths            names of outputs, and their checks
    output_writers          writers of grids, folders, npz, npy and parquet
    image_reader            images of this library and of other programs; `open_drawn`
    array_files             npz and npy files

Edits
    picture_edit            pictures, sampler and draws of an edit
    edited_images           draws into a folder, resumed

Options are in `options` and `edit_options`. Public names load on first use, so that options are
parsed before torch is imported.
"""

from typing import TYPE_CHECKING

from ddpm_hf.utils.first_use import imported_on_first_use

if TYPE_CHECKING:
    from ddpm_hf.sampling.batches import draw_images
    from ddpm_hf.sampling.image_reader import DrawnImages, open_drawn
    from ddpm_hf.sampling.options import SamplerOptions
    from ddpm_hf.sampling.sampler_choice import SamplerSetting, choose_setting, use_recommended
    from ddpm_hf.sampling.sampling_to_files import save_drawn
    from ddpm_hf.sampling.sharded_sampling import draw_to

__all__ = [
    "DrawnImages",
    "SamplerOptions",
    "SamplerSetting",
    "choose_setting",
    "draw_images",
    "draw_to",
    "open_drawn",
    "save_drawn",
    "use_recommended",
]

__getattr__ = imported_on_first_use(
    __name__,
    {
        "sampling.image_reader": "DrawnImages open_drawn",
        "sampling.options": "SamplerOptions",
        "sampling.sampler_choice": "SamplerSetting choose_setting use_recommended",
        "sampling.batches": "draw_images",
        "sampling.sharded_sampling": "draw_to",
        "sampling.sampling_to_files": "save_drawn",
    },
)

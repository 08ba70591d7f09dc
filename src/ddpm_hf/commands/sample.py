"""`ddpm-hf sample`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_hf.commands.messages import command_options, resume_hint, say_recommended
from ddpm_hf.model_options import LoadOptions, ModelArgument
from ddpm_hf.sampling.options import DrawOptions, ImageOptions, SamplingOptions
from ddpm_hf.utils.text import counted, public_name

if TYPE_CHECKING:
    from ddpm_hf.sampling import SamplerSetting

HELP = "draw images from a model on the Hub or in a folder"
DESCRIPTION = """
draw images from a model on the Hub or in a folder

  ddpm-hf sample runs/photos/model                      a grid, samples.png
  ddpm-hf sample runs/photos/model --output images      a folder with one file per image
  ddpm-hf sample google/ddpm-cifar10-32 --scheduler DDIM      50 steps instead of 1,000
  ddpm-hf sample runs/photos/model --thorough           all steps, even if fewer are recommended
  ddpm-hf sample runs/pets/model --class-labels cat dog       images of each class in turn
  ddpm-hf sample runs/photos/model --num-images 50000 --output photos.npz
                                       a set for evaluation; repeat the command to resume it
  accelerate launch --num-processes 4 -m ddpm_hf sample runs/photos/model --num-images 50000
      --output photos.parquet          the same images, on four devices

Image i depends on the seed and on i only, for any number of images and processes. Its bits are the
same at one --batch-size on one type of device (on a CPU, with one OMP_NUM_THREADS). Other values
change the order of sums: 28x28 digits in 50 steps with eta 0, sampled in batches of 1, 7 or 64 by 1
or 2 threads, differed by at most 7e-6 of the range from those in batches of 16, and no 8-bit pixel
differed.
"""


@dataclass(frozen=True, kw_only=True)
class SampleCommand(LoadOptions, SamplingOptions, ModelArgument):
    """Options of `ddpm-hf sample`."""


def run(argv: list[str]) -> int:
    """Sample images from a model."""
    usage = "MODEL [--option VALUE ...]"
    with command_options(SampleCommand, argv, "sample", usage, DESCRIPTION) as options:
        from ddpm_hf.commands.model_checks import downloaded_models

        output = options.output_path()
        check_paths(options, output)
        with downloaded_models([options.model], options), resume_hint("batches"):
            sample(options, output)
    return 0


def check_paths(options: SampleCommand, output: Path) -> None:
    """Check model, classes and output before torch is imported.

    Raises:
        ValueError: for a local model that does not exist or does not support the options, and for
            an invalid or existing output.
    """
    from ddpm_hf.commands.model_checks import check_model, check_model_options
    from ddpm_hf.sampling.output_paths import batch_folder, check_is_free, check_output

    check_model(options.model)
    if options.guide:
        check_model(options.guide)
    check_output(output)
    check_model_options(
        options.model,
        class_labels=options.class_labels or (),
        guidance_scale=None if options.guide else options.guidance_scale,
        num_inference_steps=options.num_inference_steps,
    )
    if not options.overwrite and not batch_folder(output).exists():
        check_is_free(output)


def sample(options: SampleCommand, output: Path) -> None:
    """Load the model, sample the images and save them."""
    from ddpm_hf.hub.load import load
    from ddpm_hf.sampling.planned_optimization import optimize_for_images
    from ddpm_hf.sampling.sampler_choice import choose_setting
    from ddpm_hf.sampling.sampling_to_files import reserved_output, save_images
    from ddpm_hf.utils.shared_work import distributed_state, leave_process_group

    # Reserve the output before the model is loaded.
    state = distributed_state()
    with reserved_output(output, state):
        pass
    pipeline = load(options.model, **options.keywords(LoadOptions)).to(state.device)
    setting = choose_setting(pipeline, options)
    say_recommended(setting)
    pipeline.scheduler = setting.scheduler
    drawing = draw_options(options, setting)
    optimized = None
    if options.optimize:
        optimized = optimize_for_images(pipeline, drawing, output)
        if state.is_main_process:
            print(f"optimized: {optimized}")
            if optimized.guide is not None:
                print(f"optimized guide: {optimized.guide}")
    is_new = save_images(
        pipeline,
        output,
        drawing,
        model={"name": public_name(options.model), "revision": options.revision},
        optimized=optimized,
    )
    if leave_process_group():
        already = "" if is_new else ", sampled before with the same options"
        print(f"{counted(options.num_images, 'image')} in {output}{already}")


def draw_options(options: SampleCommand, setting: "SamplerSetting") -> DrawOptions:
    """Options of the images with the chosen sampler; loads the guide."""
    from ddpm_hf.hub.load import load

    drawing = DrawOptions(
        **options.keywords(ImageOptions),
        **setting.arguments(),
        batch_size=options.batch_size,
        overwrite=options.overwrite,
    )
    if options.guide is None:
        return drawing
    scale = 2.0 if options.guidance_scale is None else options.guidance_scale
    return replace(drawing, guide=load(options.guide), guidance_scale=scale)

"""`ddpm-hf edit`."""

from dataclasses import dataclass

from ddpm_hf.commands.messages import command_options, resume_hint, say_recommended
from ddpm_hf.model_options import LoadOptions, ModelArgument
from ddpm_hf.sampling.edit_options import EditOptions, EditOutputOptions, PictureArgument
from ddpm_hf.utils.text import close_paths, counted, public_name

HELP = "edit a picture: inpaint, vary, interpolate, change its class"
DESCRIPTION = """
edit a picture with a model

  ddpm-hf edit runs/photos/model photo.png --mask mask.png       draw the white part anew
  ddpm-hf edit runs/photos/model photo.png --strength 0.4        variations of the picture
  ddpm-hf edit runs/photos/model photo.png --between other.png   images from one to the other
  ddpm-hf edit runs/pets/model rex.png --source-class dog --class-labels cat
                                                                 the same picture as another class

Several draws show what the model considers possible. std.png is their standard deviation: bright
where they differ. The part of a picture outside the mask comes back bit by bit. Repeat the command
to resume an interrupted edit.
"""


@dataclass(frozen=True, kw_only=True)
class EditCommand(LoadOptions, EditOutputOptions, EditOptions, PictureArgument, ModelArgument):
    """Options of `ddpm-hf edit`."""


def run(argv: list[str]) -> int:
    """Edit a picture."""
    usage = "MODEL PICTURE [--option VALUE ...]"
    with command_options(EditCommand, argv, "edit", usage, DESCRIPTION) as options:
        from ddpm_hf.commands.model_checks import (
            check_model,
            check_model_options,
            downloaded_models,
        )

        check_model(options.model)
        for path in (options.image, options.mask_image, options.between):
            if path is not None and not path.is_file():
                raise ValueError(f"{path} is not a file{close_paths(str(path))}")
        source = [] if options.source_class is None else [options.source_class]
        check_model_options(
            options.model,
            class_labels=[*source, *(options.class_labels or ())],
            needs_class=options.guidance_scale != 0,
            guidance_scale=options.guidance_scale,
            num_inference_steps=options.num_inference_steps,
        )
        with downloaded_models([options.model], options), resume_hint("batches"):
            edit(options)
    return 0


def edit(options: EditCommand) -> None:
    """Load the model, edit the picture and print what was written."""
    from ddpm_hf.hub.load import load
    from ddpm_hf.sampling.edited_images import edit_images
    from ddpm_hf.sampling.picture_edit import EditPictures, PictureEdit
    from ddpm_hf.utils.shared_work import distributed_state, leave_process_group

    state = distributed_state()
    pipeline = load(options.model, **options.keywords(LoadOptions)).to(state.device)
    pictures = EditPictures.read(options.image, options)
    edit = PictureEdit(pipeline, pictures, EditOptions(**options.keywords(EditOptions)))
    say_recommended(edit.setting)
    edited = edit_images(
        edit,
        options.output,
        overwrite=options.overwrite,
        model={"name": public_name(options.model), "revision": options.revision},
    )
    if not leave_process_group():
        return
    if edited.expected_gain is not None:
        print(f"about {edited.expected_gain:.0%} of the picture's contrast is kept")
    if edited.std is not None and len(edited.images) > 1:
        print(f"mean standard deviation of a pixel: {edited.std.mean():.3f} of the range")
    print(f"{counted(len(edited.images), 'image')} in {edited.folder}, all in grid.png")

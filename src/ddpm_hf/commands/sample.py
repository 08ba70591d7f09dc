"""`ddpm-hf sample`."""

from pathlib import Path

from ddpm_hf.commands.options import command_parser, positive_int

HELP = "draw images from a model on the Hub or in a folder"


def run(argv: list[str]) -> int:
    """Draw as `argv` says."""
    parser = command_parser("sample", HELP)
    parser.add_argument("model", metavar="MODEL", help="Hub repository or folder of a model")
    parser.add_argument(
        "--num-images",
        type=positive_int,
        default=16,
        metavar="N",
        help="how many to draw (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("samples.png"),
        metavar="PATH",
        help="an image file for one grid of all, else a folder for one file each "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--num-inference-steps",
        type=positive_int,
        metavar="K",
        help="denoising steps (default: as many as the model was trained with)",
    )
    parser.add_argument(
        "--eta",
        type=float,
        default=1.0,
        help="1: DDPM; 0: deterministic DDIM, for few steps (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="image i depends on the seed and on i alone (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=16,
        metavar="N",
        help="images drawn at once (default: %(default)s)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub (default: main)")
    options = parser.parse_args(argv)
    options.output.parent.mkdir(parents=True, exist_ok=True)  # fails before the work, if at all
    from ddpm_hf.hub.load import load
    from ddpm_hf.pictures import best_device, draw_images, save_images

    pipeline = load(options.model, revision=options.revision).to(best_device())
    images = draw_images(
        pipeline,
        options.num_images,
        batch_size=options.batch_size,
        seed=options.seed,
        num_inference_steps=options.num_inference_steps,
        eta=options.eta,
    )
    print(f"{options.num_images} images in {save_images(images, options.output)}")
    return 0

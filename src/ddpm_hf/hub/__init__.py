"""The Hugging Face Hub: loading and pushing of checkpoints, and model cards.

Loading
    load                    `load`, and its last step, `open_pipeline`
    download                from a name to a folder: local, from the Hub, or in the cache
    model_files             which files are loaded, and their checks

Pushing
    push                    `push`: access, commit, and result
    published_files         which files are uploaded, and their checks
    background_push         pushes of a training run, whose failures do not stop it
    space                   the Space that serves a model
    secrets                 tokens and local paths in files
    retry                   retries of temporary errors, and messages for the others

Model card
    card                    written, updated with results, and shared
    card_facts              the facts of a checkpoint, from its files
    card_rendering          text and metadata, from card_template.md
    card_few_steps          bits/dim of few steps, and samplers
    card_metrics_table      metrics, and the commands that measure them again
    card_update             generated sections of an existing card are renewed
    markdown                values as Markdown

Options of `push` are in `options`, those of `load` in `ddpm_hf.model_options`.
"""

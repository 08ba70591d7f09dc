"""One module per command of `ddpm-hf`: its HELP in a line, and `run(argv) -> exit status`.

At the top they import only the standard library, so that `--help` comes at once.
"""

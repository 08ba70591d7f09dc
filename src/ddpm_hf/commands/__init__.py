"""Commands of `ddpm-hf`, one module each: HELP is one line, `run(argv)` returns the exit status.

At the top they import only modules without torch and transformers, which keeps `--help` fast.
"""

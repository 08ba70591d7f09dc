"""The Hub: loading models from it, pushing checkpoints to it, and their cards."""

"""The Hugging Face Hub: loading and pushing of checkpoints, and model cards."""

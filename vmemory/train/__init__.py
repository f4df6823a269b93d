"""Training of video models, with and without a memory."""

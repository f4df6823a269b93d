"""Shared code of the model families: encoding videos, compressing them, and shrinking prompts."""

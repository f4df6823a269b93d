"""Memories: bounded, timestamped, under one contract."""

"""Plain PyTorch definitions of every op: what correct means."""

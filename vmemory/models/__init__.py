"""What every model family shares: how its videos are encoded, how its prompts shrink with them."""

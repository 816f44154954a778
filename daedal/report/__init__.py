"""What a correct answer cost: recorded answers joined with measured and predicted costs, as a page and as numbers."""

"""Other frameworks that run the same checkpoints: what is written for them, and their runners."""

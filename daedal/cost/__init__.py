"""What a model costs: counted here, compared with what was measured elsewhere. Imports no torch."""

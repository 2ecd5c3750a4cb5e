"""Photos, degradations, LR/HR pairs and preferences."""

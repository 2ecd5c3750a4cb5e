"""Judges: networks that rate an SR image against its LR image."""

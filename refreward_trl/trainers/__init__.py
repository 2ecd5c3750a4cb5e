"""Trainers: one config and one trainer module per method, on a common base."""

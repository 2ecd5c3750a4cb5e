"""Objectives: pure functions of tensors. They know no model, no data and no trainer.

All compute in float32. A missing reward or score is NaN: it counts for nothing and poisons nothing. Losses are divided
by the number of samples (or groups) in the batch, missing ones included, so that micro-batches and ranks of equal size
average to the loss of the whole batch.
"""

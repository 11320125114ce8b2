"""Model files, tensors, layers and bytes: everything that one stage computes."""

"""The arithmetic of a decoder: families, weights, attention, KV pages, sampling."""

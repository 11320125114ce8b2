"""Tests of `sharding.kernels`."""

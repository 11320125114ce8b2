"""Tests of the `sharding` package."""

"""Tests; the folders mirror the three packages."""

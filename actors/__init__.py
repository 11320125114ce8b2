"""Stages, requests, time and failure: the pipeline of stages and the engine that drives it."""

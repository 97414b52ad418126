"""Many requests: files of prompts, and an engine with pipelines that stay loaded, with the ways in to it."""

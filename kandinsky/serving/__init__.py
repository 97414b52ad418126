"""What answers requests for as long as it runs: an engine with pipelines that stay loaded, and the ways in to it."""

"""What the command line can do, a file for each; flags become words that the rest of the house understands."""

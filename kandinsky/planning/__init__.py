"""What a request will take on a machine, and the settings with which it fits, before anything is loaded."""

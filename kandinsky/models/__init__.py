"""Neural networks as pure modules: no devices, no files, no environment, no state between calls."""

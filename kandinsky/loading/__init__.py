"""From a config to a working pipeline: the one room that knows files, devices and dtypes at once."""

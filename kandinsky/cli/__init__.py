"""The command line's rooms: flags into words, and one file for each thing that `test.py` can do."""

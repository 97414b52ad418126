"""What every room may use: what was given, looked at; files read within bounds; files written whole or not at all."""

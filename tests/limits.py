"""How long a test waits before it calls what it waits for stuck."""

PATIENCE = 1800.0  # seconds: far beyond what anything here takes on the busiest machine; it only ends what hangs

"""How far tests go, and how long they wait before they call what they wait for stuck."""

import os

PATIENCE = 1800.0  # seconds: far beyond what anything here takes on the busiest machine; it only ends what hangs
EVERYTHING = "FUZZ_SECONDS" in os.environ  # `make exhaustive` and `make fuzz`: also what another case shows already

"""What makes a run fast or small, never what makes it right. Only `loading.py` imports from here."""

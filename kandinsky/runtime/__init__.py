"""What makes a run fast or small, never what makes it right. Only `loading/` imports from here."""

"""Words (and the pictures beside them) into embeddings, and short prompts into captions."""

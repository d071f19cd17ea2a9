"""Is this answer right? Exact, bounded, and never by evaluating a text. Imports no torch."""

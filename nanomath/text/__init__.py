"""Text to token ids and back: our tokenizer, other people's, chat layouts. Imports no torch."""

"""Models from elsewhere, and to elsewhere: Hugging Face folders, downloads."""

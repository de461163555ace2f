"""Sources of text and pairs: embedded books, generated exercises, local files, the Hugging Face hub."""

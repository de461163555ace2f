"""From ids to more ids: decoding, sampling, beam search, answers to prompts, translation of files."""

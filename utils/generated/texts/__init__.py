"""Texts about images: captions by a captioner, prompts made of them, and a text of each training identity."""

"""Generated people: captions and images as they are made, and how they are scored, chosen and kept."""

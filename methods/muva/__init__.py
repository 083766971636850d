"""MUVA: part tokens under masks, and texts of parts: `training`. `settings` has flags and imports nothing large."""

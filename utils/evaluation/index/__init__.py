"""A gallery whose features stay on disk: searched without reading it into memory, and added to."""

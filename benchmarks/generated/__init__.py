"""How often captions and filters are right, on drawn people whose truth is known."""

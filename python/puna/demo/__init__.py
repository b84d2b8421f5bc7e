"""The bundled demo checkpoint and the small world that it knows."""

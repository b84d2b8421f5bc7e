"""The bundled demo model: its data, its training and its evaluation. See README.md."""
